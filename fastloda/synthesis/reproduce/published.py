"""The paper's published values, shown beside measured ones: accuracy in percent by (method, epsilon); None: without privacy.

"Efficient Differentially Private Fine-Tuning of Diffusion Models", Tables II to IV; accuracy on real test images of a classifier
trained on synthetic images only (DP-SGD: on the private images themselves).
"""

from collections.abc import Mapping

Accuracies = Mapping[tuple[str, float | None], float]


def _rows(epsilons: tuple[float, ...], **rows: tuple[float, ...]) -> dict[tuple[str, float | None], float]:
    named = {name.replace("_", "-"): values for name, values in rows.items()}
    return {
        (name, epsilon): value
        for name, values in named.items()
        for epsilon, value in zip(epsilons, values, strict=True)
    }


CIFAR10: Accuracies = _rows(
    (1.0, 5.0, 10.0),
    DP_LoDA=(60.2, 62.2, 63.5),
    DP_Diffusion=(66.3, 69.6, 69.7),
    DP_LDM=(51.3, 59.1, 65.3),
    DP_SGD=(36.5, 47.4, 48.3),
    DP_MEPF=(29.4, 48.5, 51.0),
    DP_MERF=(13.8, 13.4, 13.2),
) | {("No privacy", None): 90.7}

CIFAR10_1PCT: Accuracies = _rows((1.0, 10.0), DP_LoDA=(54.2, 53.6), DP_Diffusion=(54.6, 55.9), DP_SGD=(11.5, 21.2)) | {
    ("No privacy", None): 52.5
}

MNIST: Accuracies = _rows((10.0,), DP_LoDA=(95.0,), DP_Diffusion=(95.9,), DP_LDM=(94.3,), DP_SGD=(79.3,)) | {
    ("No privacy", None): 99.4,
    ("Public only", None): 60.2,
}
