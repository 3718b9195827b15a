"""No DP: the classifier trained on the private images without privacy, against which the cost of privacy is measured."""

from dataclasses import asdict, dataclass, replace

from fastloda.synthesis.classify import train_classifier
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.settings import Classifier

from .base import Budget, PrivateClassifier, Release, Spent, Work


@dataclass(frozen=True)
class NoDP:
    """The method without privacy, with the same classifier settings as for synthetic images."""

    classifier: Classifier
    name: str = "No privacy"
    trained_on: str = "the private images"
    has_budget: bool = False

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> PrivateClassifier:
        settings = asdict(replace(self.classifier, seed=work.seed))
        network = train_classifier(private, **settings, device=work.device, progress=work.progress)
        return PrivateClassifier(network, Spent(budget.delta, (Release("training without noise", 1.0, 0.0, 1),)))
