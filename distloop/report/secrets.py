"""Environment variables that a report may show: those of launchers and of what computes, by name, without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

EXACT = frozenset(
    [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
        *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "CC", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD"),
        *("XDG_CACHE_HOME", "MALLOC_ARENA_MAX"),
    ]
)
PREFIXES = (
    *(
        "OMPI_",
        "PET_",
        "PMI_",
        "PMIX_",
        "PRTE_",
        "MPI_",
        "MPICH_",
        "MPIR_",
        "MPI4PY_",
        "HYDRA_",
        "I_MPI_",
        "MV2_",
        "MVP_",
    ),
    *("SLURM_", "UCX_", "FI_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "ATEN_"),
    *("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "NCCL_", "RCCL_", "GLOO_", "TORCH", "PYTORCH_", "DS_", "DISTLOOP_"),
)
BLANK = "(blanked)"
LONGEST = 300
# A name that says what it holds; words of it are bounded, as MONKEY is no key.
NAMES = re.compile(
    r"SECRET|TOKEN|PASS(?!IVE)|PWD|CREDENTIAL|COOKIE|PRIVATE|JWT|BEARER|SIGNATURE|API_?KEY|(^|_)(KEY|AUTH|KEYS)(_|\d|$)",
    re.IGNORECASE,
)
VALUES = re.compile(
    "|".join(
        (
            r"[a-z][a-z0-9+.-]*://[^\s/]*@",  # user:password@ in an address
            r"[^\s/:@=,;]+:[^\s/@]+@(?=[\w.-]+)",
            r"\b(gh[a-z]_|github_pat_|hf_|sk-|glpat-|xox[a-z]-|AKIA|ASIA|AIza|ya29\.|npm_|pypi-)[\w.-]{8,}",
            r"\beyJ[\w-]{10,}(\.[\w-]+)*",  # a JSON web token
            r"-----BEGIN [^-]*KEY-----",
            r"\bBearer\s+\S+",
            r"(?i:secret|token|passw(?:or)?d|passphrase|credential|api_?key|signature|[?&;](?:key|sig|auth))\s*[=:]\s*[^\s&,;]+",
        )
    )
)
# Too regular for words, too long for numbers; a GPU's own number is no secret.
LONG = re.compile(r"(?<![\w+/=-])(?!GPU-|MIG-)(?=[\w+/=-]*\d)(?=[\w+/=-]*[A-Za-z])[A-Za-z0-9+=_-]{32,}(?![\w+=-])")


def variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that may be shown, in order of their names."""
    env = os.environ if environment is None else environment
    return {name: shown(name, env[name]) for name in sorted(env) if name in EXACT or name.startswith(PREFIXES)}


def shown(name: str, value: str) -> str:
    """Return a variable's value, or that it is blanked, or what of it may be seen."""
    if NAMES.search(name) and value:
        return BLANK
    text = blank(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def blank(text: str) -> str:
    """Return a text without what looks like secrets in it."""
    if "-----BEGIN" in text:
        return BLANK
    return LONG.sub(BLANK, VALUES.sub(BLANK, text))
