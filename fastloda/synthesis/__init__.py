"""The paper's system: from a private image set to synthetic images, and the methods that it is compared with."""
