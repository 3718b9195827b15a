"""Low-rank adapters of convolutions and linear layers (LoDA): their arithmetic, where they are attached, their files."""
