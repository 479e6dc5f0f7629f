"""Zero-shot segmentation: prompts, protocols, the reference and the fast path, datasets, scores, pictures."""

from groupvit_fast.segmentation.datasets import SegmentationDataset, VocFolder, open_dataset
from groupvit_fast.segmentation.evaluation import evaluate
from groupvit_fast.segmentation.prompts import class_embeddings
from groupvit_fast.segmentation.protocols import Protocol, protocol
from groupvit_fast.segmentation.reference import segment_image
from groupvit_fast.segmentation.report import Evaluation

__all__ = [
    "Evaluation",
    "Protocol",
    "SegmentationDataset",
    "VocFolder",
    "class_embeddings",
    "evaluate",
    "open_dataset",
    "protocol",
    "segment_image",
]
