"""Reproduction of the paper's tables, cell by cell."""

from .command import reproduce
from .recipe import TableName

__all__ = ["TableName", "reproduce"]
