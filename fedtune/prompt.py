"""Asking a causal language model for a class: the template, and the words it answers with."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from fedtune.errors import ExitCode, FedtuneError

if TYPE_CHECKING:
    from fedtune.config import Config, ModelConfig

__all__ = ["TEMPLATE", "first_tokens", "is_causal", "prompted", "split_template"]

TEMPLATE = "{text}\nAnswer:"
"""What stands around a text where ``data.template`` says nothing else."""


def split_template(template: str) -> tuple[str, str]:
    r"""Return what stands before and after the text.

    Raises
    ------
    ValueError
        There is not exactly one plain ``{text}``, another field, or a space at the end.

    Examples
    --------
    >>> split_template("Review: {text}\nAnswer:")
    ('Review: ', '\nAnswer:')
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"'{template}' is not a template: {error}") from error
    fields = [part[1:] for part in parts if part[1] is not None]
    if fields != [("text", "", None)]:
        raise ValueError(
            f"'{template}' must have {{text}} once, and no other field; "
            "write {{ and }} for a brace that is text"
        )
    at = next(i for i, part in enumerate(parts) if part[1] is not None)
    after = "".join(part[0] for part in parts[at + 1 :])
    if after.endswith((" ", "\t")):
        raise ValueError(f"'{template}' ends in a space: leave it out, the answer brings its own")
    return "".join(part[0] for part in parts[: at + 1]), after


def first_tokens(tokenizer: Any, template: str, words: Sequence[str]) -> tuple[int, ...]:
    """Return the token that each word begins with where it follows a template.

    A word follows after a space, as it does in a text; after a line end, and in writing
    without spaces, at once.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    template : str
        With ``{text}``.
    words : sequence of str

    Returns
    -------
    tuple of int
        One for each word, all different.

    Raises
    ------
    FedtuneError
        The tokenizer joins template and word, knows no token for a word, or two words
        begin alike.
    """
    end = "x" + split_template(template)[1]
    asked = _tokens(tokenizer, end)
    found: dict[int, str] = {}
    for word in words:
        whole = _tokens(tokenizer, end + _gap(end, word) + word)
        if whole[: len(asked)] != asked or len(whole) == len(asked):
            raise FedtuneError(
                f"data.template='{template}': this tokenizer makes one token of its end and "
                f"the beginning of '{word}'",
                hint="end the template in a sign that stands alone, such as ':'",
                code=ExitCode.CONFIG,
            )
        first = whole[len(asked)]
        if first == tokenizer.unk_token_id:
            raise FedtuneError(
                f"this model has no token for the word '{word}'",
                hint="name words in model.words that the model knows",
                code=ExitCode.CONFIG,
            )
        if first in found:
            raise FedtuneError(
                f"the words '{found[first]}' and '{word}' begin with the same token of this "
                f"model, '{tokenizer.convert_ids_to_tokens(first)}'",
                hint="name words in model.words that begin differently",
                code=ExitCode.CONFIG,
            )
        found[first] = word
    return tuple(found)


def is_causal(settings: Mapping[str, Any]) -> bool:
    """Say whether a model's ``config.json`` is that of a causal language model.

    Examples
    --------
    >>> is_causal({"architectures": ["GPT2LMHeadModel"]})
    True
    >>> is_causal({"architectures": ["BertForMaskedLM"]})
    False
    """
    if settings.get("is_encoder_decoder"):
        return False
    names = settings.get("architectures") or []
    return bool(settings.get("is_decoder")) or any(
        re.search(r"ForCausalLM$|(?<!With)LMHeadModel$", name) for name in names
    )


def prompted(config: Config) -> Config:
    """Return the settings with ``model.pooling='prompt'`` where ``auto`` means that.

    A classification without gradients on a causal language model: with a new head, the
    zeroth-order methods lose most of what they reach (Malladi et al. 2023, appendix E).
    """
    chosen = config.model.task == "classification" and config.model.pooling == "auto"
    if not chosen or config.tuning.by_gradient or not is_causal(_settings(config.model)):
        return config
    table = config.model_dump(by_alias=True)
    table["model"]["pooling"] = "prompt"
    return type(config).model_validate(table)


def _settings(model: ModelConfig) -> dict[str, Any]:
    """Return a model's ``config.json``; empty where it cannot be had, which loading reports."""
    from fedtune.models import model_folder

    try:
        folder = Path(model_folder(model.base))
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            found = hf_hub_download(model.base, "config.json", revision=model.revision or None)
            folder = Path(found).parent
        table: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, FedtuneError):
        return {}
    return table


def _gap(end: str, word: str) -> str:
    """Return what separates a word from what it follows: writing in wide signs has no spaces."""
    closed = end[-1].isspace() or word[0].isspace()
    wide = any(unicodedata.east_asian_width(sign) in "WF" for sign in (end[-1], word[0]))
    return "" if closed or wide else " "


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
