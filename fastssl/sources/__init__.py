"""Who delivers canvases, and which rows come when."""

from fastssl.sources.base import Source, open_source
from fastssl.sources.manifest import LabelSplit, Manifest, SplitInfo, load_labels, load_manifest, load_split

__all__ = ["LabelSplit", "Manifest", "Source", "SplitInfo", "load_labels", "load_manifest", "load_split", "open_source"]
