"""What a folder written by PEFT holds: its LoRA settings, and what each of its tensors is for."""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import xxhash
from numpy.typing import NDArray

from ...errors import MagMaxError, list_problems
from ..base import Checkpoint, read_small
from ..dtypes import TensorSpec
from ..safetensors import SafetensorsFile
from ..torch.pickled_models import TorchStateDict
from .bounded_regex import BoundedRegexError, compile_regex

ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""How PEFT begins the name of every tensor."""
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
UNSUPPORTED_SETTINGS = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora",
    "use_bdlora", "velora_config", "enable_lora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""Settings under which the tuned weight is more than W + s * B A."""
KNOWN_SETTINGS = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "init_lora_weights",
    "bias", "modules_to_save", "ensure_weight_tying", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "inference_mode", "task_type", "base_model_name_or_path", "revision",
    "auto_mapping", "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
})  # fmt: skip
"""Settings that are read here, or that concern training alone."""
LORA_FILE_NAME = re.compile(
    r"\.(lora_(down|up|mid|A|B|embedding_[AB])|lora\.(down|up)|lora_linear_layer\.(down|up))(\.weight)?$"
    r"|_lora\.(down|up)\.weight$|\.(hada|lokr)_\w+$"
)
"""Names of tensors in files of LoRA, LoHa and LoKr."""
SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the base's weights as they are."""
PROMPT_TYPES = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
UNSUPPORTED_HINTS = "merge the adapter with PEFT (merge_and_unload), save the model and give that"


class StoredFactor(NamedTuple):
    """A stored matrix to be read as (rank, length): as it is, or transposed where it is stored (length, rank)."""

    tensor_name: str
    rank: int
    length: int
    is_rank_first: bool


class LowRankUpdate(NamedTuple):
    """scale * (left^T right), to be added to a weight that has `left`'s length of rows, each of `right`'s."""

    left: StoredFactor
    right: StoredFactor
    scale: float


class PeftAdapter(Checkpoint):
    """The folder of a LoRA adapter: its own tensors under their own names, and what its settings say of them.

    Attributes:
        config: the parsed adapter_config.json.
        factor_pairs: (module, whether it is an embedding) -> "A" and "B" -> the tensor that is this factor.
        replacements: the base's name of a tensor -> the adapter's tensor that stands in its place (modules_to_save,
        biases). problems: what cannot be used, in words.

    Raises:
        MagMaxError: an adapter of another kind, or files that are missing or cannot be read.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self._config_path = folder / ADAPTER_CONFIG
        self.config = self._read_config(label)
        self.weights = _open_weights(folder, label)
        super().__init__(label, self.weights.specs)
        self.path, self.aliases = folder, self.weights.aliases
        self.factor_pairs: dict[tuple[str, bool], dict[str, str]] = {}
        self.replacements: dict[str, str] = {}
        self.problems: list[str] = []
        self._classify_tensors()

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self.weights.read(key, start, stop)

    def files(self) -> list[Path]:
        return [self._config_path, *self.weights.files()]

    def header_digests(self) -> list[str]:
        return [self._config_digest, *self.weights.header_digests()]

    @property
    def fan_in_fan_out(self) -> bool:
        """Return whether the adapter says that its weights are stored transposed."""
        return self.config.get("fan_in_fan_out") is True

    def factor_names(self, module: str, is_embedding: bool) -> tuple[str, str]:
        """The names of a module's factors A and B. Raises MagMaxError if one of them is missing."""
        pair = self.factor_pairs[module, is_embedding]
        if len(pair) < 2:
            ((letter, half),) = pair.items()
            other = "B" if letter == "A" else "A"
            raise MagMaxError(f"{self.weights.label}: holds {half}, but not the lora_{other} to it; copy it again")
        return pair["A"], pair["B"]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """r, and lora_alpha / r or lora_alpha / sqrt(r), after the patterns that name the module."""
        rank, alpha = (
            self._config_value("rank_pattern", "r", module),
            self._config_value("alpha_pattern", "lora_alpha", module),
        )
        if type(rank) is not int or not 0 < rank < 1 << 31:
            raise MagMaxError(
                f"{self._config_path}: the rank r of {module} is {rank!r}; it must be a positive whole number"
            )
        if type(alpha) not in (int, float) or not _is_finite(alpha):
            raise MagMaxError(f"{self._config_path}: lora_alpha of {module} is {alpha!r}; it must be a finite number")
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def explain_shapes(self, module: str, a: TensorSpec, b: TensorSpec, weight: TensorSpec) -> str:
        """What to do about factors A and B that do not fit a weight at the rank that the settings name."""
        rank, _ = self.rank_and_scale(module)
        if a.shape[:1] == b.shape[1:2] != (rank,):
            return f"the factors are of rank {a.shape[0]}: correct r or rank_pattern in {self._config_path}"
        theirs, ours = (TensorSpec(spec.dtype, spec.shape[1:2]).numel for spec in (a, weight))
        groups = theirs // max(1, ours)
        if len(weight.shape) > 2 and groups > 1 and theirs == groups * ours:
            return f"a convolution of {groups} groups is not supported, and PEFT cannot merge it either"
        return "give the base that the adapter was trained on"

    def _read_config(self, label: str) -> dict[str, Any]:
        try:
            text = read_small(self._config_path)
            read: Any = json.loads(text.decode())
        except (OSError, ValueError, RecursionError) as error:
            raise MagMaxError(f"{self._config_path}: cannot be read as an adapter's settings ({error})") from error
        self._config_digest = xxhash.xxh3_128_hexdigest(text)
        if not isinstance(read, dict) or cast("dict[str, Any]", read).get("peft_type") != "LORA":
            kind = cast("dict[str, Any]", read).get("peft_type") if isinstance(read, dict) else None
            prompts = str(kind) in PROMPT_TYPES
            remedy = "it adds inputs and no weights, so nothing can be merged" if prompts else UNSUPPORTED_HINTS
            raise MagMaxError(f"{self._config_path}: peft_type is {kind!r}, and only 'LORA' can be read; {remedy}")
        settings = cast("dict[str, Any]", read)
        problems = [
            f"{self._config_path}: {name} is {settings[name]!r}, which is not supported; {UNSUPPORTED_HINTS}"
            for name in UNSUPPORTED_SETTINGS
            if settings.get(name)
        ]
        problems += [
            f"{self._config_path}: {name} is {reprlib.repr(value)}, a setting that is not known; {UNSUPPORTED_HINTS}"
            for name, value in settings.items()
            if value and name not in KNOWN_SETTINGS and name not in UNSUPPORTED_SETTINGS
        ]
        if settings.get("init_lora_weights") not in SUPPORTED_INITS:
            start = settings["init_lora_weights"]
            problems.append(
                f"{self._config_path}: init_lora_weights {start!r} changes the base's own weights; {UNSUPPORTED_HINTS}"
            )
        if problems:
            raise list_problems(f"{label} is not a plain LoRA adapter", problems)
        return settings

    def _classify_tensors(self) -> None:
        """Tell by its name what each tensor is."""
        named: set[str] = set()
        for name in [*self.specs, *self.aliases]:
            plain = name.removeprefix(PEFT_PREFIX)
            if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)", plain):
                pair = self.factor_pairs.setdefault((match[1], match[2] is not None), {})
                if other := pair.get(match[3]):
                    self.problems.append(f"{self.weights.label}: {name} and {other} are one factor; save it again")
                pair[match[3]] = name
            elif match := re.fullmatch(r".+\.lora_(?:embedding_)?[AB]\.([^.]+)(?:\.weight)?", plain):
                if match[1] not in ("weight", "bias"):
                    named.add(match[1])
                    continue
                self.problems.append(
                    f"{self.weights.label}: {name} is of a kind that is not supported; {UNSUPPORTED_HINTS}"
                )
            elif re.search(r"(^|\.)(lora_|token_adapter\.|trainable_tokens_)", plain):
                self.problems.append(
                    f"{self.weights.label}: {name} is of a kind that is not supported; {UNSUPPORTED_HINTS}"
                )
            elif ".original_module." not in plain:
                self.replacements[plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
        if empty := [name for name, spec in self.specs.items() if not spec.numel]:
            self.problems.append(
                f"{self.weights.label}: {len(empty)} tensors hold no element, such as {empty[0]}; training shared out "
                "its weights (DeepSpeed ZeRO-3, FSDP): gather them and save the adapter again"
            )
        if named:
            self.problems.append(
                f"{self.weights.label}: its tensors carry the name of an adapter ({', '.join(sorted(named))}); save "
                "each adapter with PEFT's save_pretrained"
            )
        if not self.factor_pairs and not self.replacements and not self.problems:
            self.problems.append(f"{self.weights.label}: holds no tensor of an adapter; save it again with PEFT")

    def _config_value(self, patterns: str, name: str, module: str) -> Any:
        by_pattern: Any = self.config.get(patterns) or {}
        if not isinstance(by_pattern, dict):
            raise MagMaxError(
                f"{self._config_path}: {patterns} is {by_pattern!r}; it must be a map of module names to numbers"
            )
        for text, value in cast("dict[str, Any]", by_pattern).items():
            try:
                if compile_regex(text).matches_module(module):
                    return value
            except BoundedRegexError as error:
                shown = reprlib.repr(text)
                raise MagMaxError(f"{self._config_path}: {patterns} has a bad expression {shown}: {error}") from error
        return self.config.get(name, 8)


def _open_weights(folder: Path, label: str) -> Checkpoint:
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise MagMaxError(f"{label}: has {ADAPTER_CONFIG}, but no {WEIGHT_FILES[0]}; copy the whole folder again")
    return SafetensorsFile(file) if file.suffix == ".safetensors" else TorchStateDict(file, str(file))


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond every float
        return False


def refuse_lora_file(checkpoint: Checkpoint) -> None:
    """Raise MagMaxError for a file of LoRA factors without PEFT's settings, as kohya and diffusers save it."""
    found = [key for key in checkpoint.specs if LORA_FILE_NAME.search(key)]
    path = checkpoint.path
    if not found or (path is not None and (path / ADAPTER_CONFIG).is_file()):
        return
    folder = path.parent if path is not None else None
    if folder is not None and (folder / ADAPTER_CONFIG).is_file():
        raise MagMaxError(f"{checkpoint.label}: holds the weights of an adapter; give its folder, {folder}")
    raise MagMaxError(
        f"{checkpoint.label}: is a LoRA file without PEFT's {ADAPTER_CONFIG}, as kohya's scripts and diffusers save it "
        f"({found[0]}), which is not supported; merge it with diffusers (load_lora_weights, fuse_lora), save the model "
        "and give that"
    )
