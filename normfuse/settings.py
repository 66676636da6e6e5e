"""The options of normfuse, all under the prefix `normfuse.`, and what each may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from normfuse.tuning import MARGIN

PREFIX = "normfuse."
LOWERINGS = ("auto", "triton", "inline", "op")
NUMERICS = ("exact", "fast")
TUNINGS = ("off", "cached", "compile")
CHECKS = {"off": None, "sample": 1024, "all": 1}  # calls between two that are compared, at most
RULE_NAMES = (
    "rms_norm",
    "l2_norm",
    "qk_rms_norm_rope",
    "gated_rms_norm",
    "modulated_rms_norm",
    "dual_rms_norm_add",
    "rms_norm_add",
    "rms_norms",
    "dual_rms_norm_add_rms_norm",
    "rms_norm_add_rms_norm",
    "qk_rms_norm",
    "add_rms_norm",
    "rope",
)


@dataclass(frozen=True)
class Settings:
    """How a model is rewritten.

    Attributes:
        lowering: what a fused op becomes. "triton": a kernel launched by Inductor's wrapper.
            "inline": the plain decomposition, which Inductor fuses with its neighbours. "op": the
            opaque op, for tests and debugging. "auto": "triton" where a measurement says that it
            wins, else "inline".
        numerics: "exact" reproduces every rounding of eager; "fast" rounds once per norm, at its
            result.
        rules: names of the rules to keep; None keeps all.
        skip: rule names, or globs of module paths (`model.layers.0.*`), to leave alone.
        tune: which measurements "auto" goes by. "off": none. "cached": the shipped ones and the
            user's. "compile": what they lack is measured while compiling, and kept. None: "compile"
            under max-autotune, else "cached".
        margin: the share by which the kernel must be faster, 0.03 for 3 %.
        check: on which calls a fused site is compared with its inline form. "off": none.
            "sample": calls 1, 2, 4, ..., 512, and every 1024th. "all": each.
    """

    lowering: str = "auto"
    numerics: str = "exact"
    rules: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    tune: str | None = None
    margin: float = MARGIN
    check: str = "off"

    def __post_init__(self) -> None:
        _check_choice("lowering", self.lowering, LOWERINGS)
        _check_choice("numerics", self.numerics, NUMERICS)
        if self.tune is not None:
            _check_choice("tune", self.tune, TUNINGS)
        _check_margin(self.margin)
        _check_choice("check", self.check, tuple(CHECKS))
        for name in self.rules or ():
            _check_choice("rules", name, RULE_NAMES)

    @classmethod
    def split(cls, options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
        """Our options of a `torch.compile(options=...)` dictionary, and the rest: Inductor's.

        Raises:
            ValueError: an unknown option or value under our prefix.
            TypeError: a value of the wrong type.
        """
        ours = {key: value for key, value in (options or {}).items() if key.startswith(PREFIX)}
        rest = {
            key.replace("-", "_"): value
            for key, value in (options or {}).items()
            if key not in ours
        }
        return cls.of(**{key.removeprefix(PREFIX): value for key, value in ours.items()}), rest

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Settings from option values without the prefix.

        Raises:
            ValueError, TypeError: as `split`.
        """
        for name in values:
            if name not in NAMES:
                valid = ", ".join(PREFIX + option for option in NAMES)
                raise ValueError(
                    f"an option must be one of {valid}, got {PREFIX + name}: correct its name"
                )
        for name in ("rules", "skip"):
            if values.get(name) is not None:
                values[name] = _names(name, values[name])
        return cls(**values)

    def under(self, inductor_options: Mapping[str, Any]) -> Settings:
        """The same with `tune` decided: who lets Inductor try kernels lets us try ours."""
        if self.tune is not None:
            return self
        tries = inductor_options.get("max_autotune")
        return replace(self, tune="compile" if tries else "cached")

    @property
    def check_interval(self) -> int | None:
        """How many calls lie between two that are compared, at most; None: no call is."""
        return CHECKS[self.check]

    def allows(self, rule: str) -> bool:
        """Whether a rule is used at all."""
        return (self.rules is None or rule in self.rules) and rule not in self.skip

    def skipped_by(self, module: str) -> str | None:
        """The glob in `skip` that names a module path; None if none does."""
        globs = (glob for glob in self.skip if glob not in RULE_NAMES)
        return next((glob for glob in globs if fnmatchcase(module, glob)), None)


NAMES = tuple(field.name for field in fields(Settings))  # of our options, without the prefix


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        valid = ", ".join(choices)
        raise ValueError(
            f"{PREFIX}{name} must be one of {valid}, got {value!r}: choose one of them"
        )


def _check_margin(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{PREFIX}margin must be a number, got {value!r}: pass for example 0.03")
    if not 0 <= value < 1:
        raise ValueError(
            f"{PREFIX}margin must be at least 0 and below 1, got {value}: pass for example 0.03"
        )


def _names(option: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, Iterable):
        names = tuple(value)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(
        f"{PREFIX}{option} must be a list of names, got {value!r}: "
        "pass for example ['add_rms_norm']"
    )
