"""The paper's system, which turns private images into synthetic ones, and the methods that it is compared with."""
