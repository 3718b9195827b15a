"""The stages from public images to private synthetic ones: functions on a run's folder, which `runs.py` makes resumable.

pretrain    public/model.safetensors, samples.png
choose      chosen/model.safetensors, samples.png, images.npz, sums.safetensors, privacy.json: the public model, trained further
label       labels/classifier.safetensors, privacy.json: a classifier that labels the samples
finetune    layers/privacy.json, if it chooses the layers to adapt, with the numbers by which it chooses
            private/adapter.safetensors, privacy.json, epsilon.png; checkpoint.pt and source.yaml, which must stay private
sample      samples/ as `samples.py` writes it; samples-NAME/ for another set; samples-public/ from the public model alone
dpsgd       dpsgd/classifier.safetensors, privacy.json: a classifier trained on the private images themselves
evaluate    evaluation.json

Classes are matched by name: those of the public model, the private images, the samples and the tests.
"""

from .choosing import choose
from .classifying import train_classifier_privately
from .evaluating import evaluate
from .finetuning import finetune
from .labelling import label
from .pretraining import pretrain
from .sampling import sample

__all__ = ["choose", "evaluate", "finetune", "label", "pretrain", "sample", "train_classifier_privately"]
