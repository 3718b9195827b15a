"""Data sets, all of one type: built-in ones, published ones read from local folders, and the user's own."""

from .byte_images import ByteImages
from .catalogue import NAMES, PUBLIC_PARTNERS, describe, open_dataset
from .cifar10 import cifar10
from .classes import listed, mapped_names, named_classes, only, relabelled
from .colour_digits import colour_digits_split, colour_font_digits
from .digits import digits_split
from .folder import FolderFacts, class_names, image_folder, look_at
from .font_digits import Hands, font_digits, font_styles
from .imagenet32 import MATCHES, as_imagenet32, imagenet10, imagenet32
from .images import LabelledImages, load_npz
from .mnist import mnist
from .mnist5k import font_digits_as_mnist, font_styles_as_mnist, mnist5k_split
from .owners import read_owners
from .subset import stratified_subset
from .svhn import svhn

__all__ = [
    "MATCHES",
    "NAMES",
    "PUBLIC_PARTNERS",
    "ByteImages",
    "FolderFacts",
    "Hands",
    "LabelledImages",
    "as_imagenet32",
    "cifar10",
    "class_names",
    "colour_digits_split",
    "colour_font_digits",
    "describe",
    "digits_split",
    "folder",
    "font_digits",
    "font_digits_as_mnist",
    "font_styles",
    "font_styles_as_mnist",
    "image_folder",
    "imagenet10",
    "imagenet32",
    "listed",
    "load_npz",
    "look_at",
    "mapped_names",
    "mnist",
    "mnist5k_split",
    "named_classes",
    "only",
    "open_dataset",
    "read_owners",
    "relabelled",
    "stratified_subset",
    "svhn",
]
