"""Package metadata, dependencies and the `deepasmr` command."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "deepasmr_jax/__init__.py").read_text()).group(1)

setup(
    name="deepasmr_jax",
    version=VERSION,
    description="DeepASMR in JAX and Flax: zero-shot ASMR speech in anyone's voice",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["deepasmr_jax"],
    package_data={"deepasmr_jax": ["mini/*", "mini/*/*"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "transformers>=5.0,<6",
        "librosa>=0.11,<0.12",
        "tensorflow-datasets>=4.9.10,<5",
        "numpy>=2.0",
        "absl-py>=2.1",
        # brought along by the packages above, imported by name
        "array_record>=0.8",
        "pyarrow",
        "safetensors>=0.5",
        "scipy>=1.13",
        "soundfile>=0.13",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        # the TPU compiler without a TPU, for `deepasmr plan`, in the version that belongs to the jax that is installed
        "plan": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        # Mandarin text
        "zh": ["pypinyin>=0.53,<0.56"],
        # numbers and dates read as CosyVoice2's front-end does, for models with its text tokenizer
        "normalize": ["wetext>=0.1.2"],
        # judges that need no network: pocketsphinx for English; eval adds resemblyzer (torch) for speakers
        "judge": ["pocketsphinx>=5.1,<6"],
        "eval": ["pocketsphinx>=5.1,<6", "torch>=2.6", "resemblyzer>=0.1.4"],
        # training with tensorboard=true; `pip install tensorboard` shows what it writes
        "tensorboard": ["tensorboardX>=2.6,<3"],
        # the built-in model's corpus; also needs the programs flite and festival and the voice
        # festvox-us-slt-hts. pocketsphinx ranks its words, setuptools carries pkg_resources, which pyworld imports
        "corpus": [
            "pyworld>=0.3.5",
            "setuptools<81",
            "espeakng-loader>=0.2.4",
            "pypinyin>=0.53,<0.56",
            "pocketsphinx>=5.1,<6",
        ],
        # data/asmr_db.py: its offline recogniser, and its pipeline on many machines. Beam wants older protobuf and
        # pyarrow than the rest brings along: give it its own environment
        "whisper": ["torch>=2.6"],
        "beam": ["apache-beam>=2.70"],
        # reserved for a page that is served; empty, since the demo's page is one file and needs no package. Not
        # offered in the README while it is empty
        "web": [],
        # the tests use `zh`, `judge` and `normalize` too (launch/test.sh installs them); those of the corpus and of
        # the speaker judge are skipped without `corpus` and `eval`
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.14", "jiwer>=4,<5", "tensorboardX>=2.6,<3"],
        # only to make tests/golden again
        "golden": ["torch>=2.6", "s3tokenizer>=0.3", "kaldi-native-fbank>=1.22", "onnx>=1.17", "einops>=0.8"],
    },
    entry_points={"console_scripts": ["deepasmr=deepasmr_jax.cli:main"]},
)
