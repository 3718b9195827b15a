"""Low-rank adapters of convolutions and linear layers (LoDA): layers, arithmetic, attaching, files, compilation."""
