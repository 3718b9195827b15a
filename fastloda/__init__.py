"""FastLoDA: differentially private fine-tuning of convolutional models at almost no extra cost.

The public names are listed in `__init__.pyi` and imported when they are first used, so that `fastloda --help` does not wait
for PyTorch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
