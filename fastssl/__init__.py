"""fastssl: a high-throughput, data-loading-centric trainer for semi-supervised image classification."""

__version__ = "0.1.0"
