"""Mean pooling and a linear head over any Hugging Face encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["MeanPoolClassifier"]


class MeanPoolClassifier(nn.Module):
    """Classify by the mean of the last hidden states over real tokens.

    Parameters
    ----------
    encoder : nn.Module
        A model whose output has ``last_hidden_state`` of shape (B, T, d).
    labels : tuple of str
        The classes, in order.
    """

    def __init__(self, encoder: nn.Module, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        settings: Any = encoder.config
        settings.num_labels = len(labels)
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: index for index, label in enumerate(labels)}
        self.config = settings
        self.classifier = nn.Linear(settings.hidden_size, len(labels))

    def forward(self, **inputs: Any) -> Any:
        """Return logits of shape (B, labels) for what a tokenizer gives."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        for unused in ("labels", "task_ids"):
            inputs.pop(unused, None)
        mask: torch.Tensor = inputs["attention_mask"]
        hidden = self.encoder(**inputs).last_hidden_state
        # Prefix tuning lengthens the mask, not the states.
        mask = mask[:, -hidden.shape[1] :].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return SequenceClassifierOutput(logits=self.classifier(pooled))

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embedding, as prompt methods ask for it."""
        embedding: nn.Module = self.encoder.get_input_embeddings()  # type: ignore[operator]
        return embedding

    @property
    def device(self) -> torch.device:
        """Return where the model is, as prompt methods ask for it."""
        return next(self.encoder.parameters()).device
