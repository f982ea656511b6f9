"""The other side of the comparisons by public names: PyTorch networks whose state dicts have those names.

Most are installed packages. HiFi-GAN with its second kind of block and the discriminators are written here from the
publication; their names come from attribute names and PyTorch's own norms of weights.
Needs torch; the packages are imported where they are used, and of those that need far more only the files of a
network.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a state dict, in its order."""
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def load(module: nn.Module, state: dict[str, np.ndarray]) -> nn.Module:
    """The module with these numbers, in evaluation; the arrays are shared, not copied."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------- packages


def hollow(package: str, *folders: str) -> None:
    """Makes files of a package importable without the `__init__` of these folders, which import all of it."""
    if package in sys.modules:
        return
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    root = Path(found.submodule_search_locations[0])
    for folder in (".", *folders):
        module = types.ModuleType(".".join((package, *Path(folder).parts)))
        module.__path__ = [str(root / folder)]
        sys.modules[module.__name__] = module


def qwen2_config(cfg, **changes):
    """`Qwen2Config` of transformers in the sizes of an lm.Config, with these settings changed."""
    from transformers import Qwen2Config

    settings = dict(
        vocab_size=cfg.text_vocab,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
        attn_implementation="eager",
    )
    return Qwen2Config(**(settings | changes))


def qwen2(cfg) -> nn.Module:
    """`Qwen2Model` of transformers in the sizes of an lm.Config."""
    from transformers import Qwen2Model

    return Qwen2Model(qwen2_config(cfg)).float()


def speech_lm_shapes(cfg, form: int) -> dict[str, tuple[int, ...]]:
    """Names of a CosyVoice `llm.pt` (form 2 or 3) around the package's Qwen2; the tied text head is not in it."""
    with torch.device("meta"):
        out = {f"llm.model.model.{name}": shape for name, shape in shapes(qwen2(cfg)).items()}
    rows = cfg.num_codes + (3 if form == 2 else 200)
    if form == 2:
        out |= {"llm_embedding.weight": (2, cfg.width), "llm_decoder.bias": (rows,)}
    return out | {"llm_decoder.weight": (rows, cfg.width), "speech_embedding.weight": (rows, cfg.width)}


class SpeechLM:
    """Embeddings, the package's Qwen2 and the speech head on an `llm.pt`; `form` is 2 or 3 (CosyVoice2, CosyVoice3)."""

    def __init__(self, cfg, state: dict[str, np.ndarray], form: int):
        prefix = "llm.model.model."
        inner = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        with torch.device("meta"):
            self.model = qwen2(cfg)
        self.model = load(self.model, inner)
        # its table of rotary frequencies is no part of the state and stayed on the meta device
        self.model.rotary_emb = type(self.model.rotary_emb)(self.model.config)
        self.weights = {
            k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in state.items() if "llm.m" not in k
        }
        self.form, self.num_codes = form, cfg.num_codes

    @torch.inference_mode()
    def __call__(self, text: np.ndarray, speech: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Text ids [N] and speech ids [N'] of one row to the hidden states [2 + N + N', D] and speech logits."""
        table = self.weights["speech_embedding.weight"]
        if self.form == 2:
            start, task = self.weights["llm_embedding.weight"]
            bias = self.weights["llm_decoder.bias"]
        else:
            start, task, bias = table[self.num_codes], table[self.num_codes + 2], None
        words = self.model.embed_tokens(torch.as_tensor(np.asarray(text, np.int64)))
        codes = table[torch.as_tensor(np.asarray(speech, np.int64))]
        x = torch.cat([start[None], words, task[None], codes])[None]
        x = self.model(inputs_embeds=x, use_cache=False).last_hidden_state[0]
        return x, F.linear(x, self.weights["llm_decoder.weight"], bias)


def s3_v2(cfg, use_sdpa: bool = False) -> nn.Module:
    """`S3TokenizerV2` of s3tokenizer in the sizes of a speech_tokenizer.Config, with PyTorch's own attention or not.

    Version 0.3.0 has eps 1e-5 in both norms of a block; its earlier releases and the released graph have 1e-6 in
    the first one, which is set here.
    """
    placeholder("onnx")
    placeholder("torchaudio")
    from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2

    sizes = ModelConfig(cfg.num_mels, 1500, cfg.width, cfg.num_heads, cfg.num_blocks, use_sdpa=use_sdpa)
    model = S3TokenizerV2("speech_tokenizer_v2_25hz", sizes)
    for block in model.encoder.blocks:
        block.attn_ln.eps = 1e-6
    return model


def e2(cfg) -> nn.Module:
    """`UNetT` of f5-tts in the sizes of a flow.Config, imported without the package around it.

    Raises:
        ImportError: if f5-tts is absent.
    """
    hollow("f5_tts", "model", "model/backbones")
    utils = types.ModuleType("f5_tts.model.utils")
    utils.is_package_available = lambda name: False
    sys.modules[utils.__name__] = utils
    placeholder("torchaudio")
    from f5_tts.model.backbones.unett import UNetT

    return UNetT(
        dim=cfg.width,
        depth=cfg.num_layers,
        heads=cfg.num_heads,
        dim_head=cfg.head_dim,
        ff_mult=cfg.mlp_ratio,
        mel_dim=cfg.mel_bins * cfg.patch_frames,
        text_num_embeds=cfg.num_codes,
        text_dim=cfg.token_width,
        text_mask_padding=False,
        pe_attn_head=cfg.rotary_heads,
        dropout=cfg.dropout,
    )


def placeholder(name: str, **attributes) -> None:
    """Puts an empty module in the place of one that is imported, and not used by a network, unless it is installed."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # others look for it
        vars(module).update(attributes)


def wespeaker(cfg, num_speakers: int = 10) -> nn.Module:
    """`ResNet` of wespeaker-unofficial in the sizes of a speaker.Config, with the head of training that files have."""
    hollow("wespeaker", "models")
    from wespeaker.models.resnet import BasicBlock, Bottleneck, ResNet

    block = Bottleneck if cfg.bottleneck else BasicBlock
    model = ResNet(block, cfg.repeats, cfg.base_channels, feat_dim=80, embed_dim=cfg.embedding_size)
    model.projection = nn.Linear(cfg.embedding_size, num_speakers)
    return model


def s3gen(name: str) -> types.ModuleType:
    """A file of chatterbox-tts's folder `s3gen`, which holds the networks around CosyVoice2's language model."""
    hollow("chatterbox", "models", "models/s3gen")
    placeholder("omegaconf", DictConfig=dict)  # for one default value
    return importlib.import_module(f"chatterbox.models.s3gen.{name}")


def hift() -> nn.Module:
    """`HiFTGenerator` of chatterbox-tts as CosyVoice2 has it. Its own source of sines is a later one."""
    return s3gen("hifigan").HiFTGenerator(
        sampling_rate=24000,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
        f0_predictor=s3gen("f0_predictor").ConvRNNF0Predictor(),
    )


class FlowCosyvoice2:
    """`CausalMaskedDiffWithXvec` of chatterbox-tts as CosyVoice2 has it, for one row without padding at a time."""

    def __init__(self, state: dict[str, np.ndarray], chunk: int):
        encoder = s3gen("transformer.upsample_encoder").UpsampleConformerEncoder(static_chunk_size=chunk)
        estimator = s3gen("decoder").ConditionalDecoder(channels=[256])
        estimator.static_chunk_size = 2 * chunk
        solver = s3gen("flow_matching").CausalConditionalCFM(estimator=estimator)
        self.model = load(s3gen("flow").CausalMaskedDiffWithXvec(encoder=encoder, decoder=solver), state)
        down, up = estimator.down_blocks[0], estimator.up_blocks[0]
        self.kept = {}
        for name, net in {
            "encoder.embed": encoder.embed,
            "encoder.look_ahead": encoder.pre_lookahead_layer,
            "encoder.layers": encoder.encoders[-1],
            "encoder.frames": encoder.up_layer,
            "encoder.up_embed": encoder.up_embed,
            "encoder.up_layers": encoder.up_encoders[-1],
            "encoder.mu": self.model.encoder_proj,
            "mel": solver,
            "estimator.time": estimator.time_mlp,
            "estimator.down_resnet": down[0],
            "estimator.down": down[1][-1],
            "estimator.down_conv": down[2],
            "estimator.middle": estimator.mid_blocks[-1][1][-1],
            "estimator.up": up[2],
            "estimator.velocity": estimator.final_proj,
        }.items():
            net.register_forward_hook(functools.partial(self.keep, name))

    def keep(self, name: str, _, __, out) -> None:
        """Notes the first row of an output, time first."""
        out = (out[0] if isinstance(out, tuple) else out)[0]
        last = ("frames", "mel", "down_resnet", "down_conv", "up", "velocity")  # these have time last
        self.kept[name] = out.T if name.split(".")[-1] in last else out

    @torch.inference_mode()
    def __call__(self, data: dict[str, np.ndarray], row: int) -> dict[str, torch.Tensor]:
        """All groups of one row, as `reference` of make_flow_cosyvoice2.py takes and names them."""
        n, prompt = int(data["num_tokens"][row]), int(data["prompt_frames"][row])
        at = {name: torch.tensor(x[row])[None] for name, x in data.items() if name != "noise"}
        first, rest = at["tokens"][:, :n].split([prompt // 2, n - prompt // 2], dim=1)
        self.model.inference(
            token=rest,
            token_len=torch.tensor([rest.shape[1]]),
            prompt_token=first,
            prompt_token_len=torch.tensor([first.shape[1]]),
            prompt_feat=at["prompt_mel"][:, :prompt],
            prompt_feat_len=None,
            embedding=at["speaker"],
            finalize=True,
            noised_mels=torch.tensor(data["noise"][: 2 * n]).T[None],
        )
        x, mu, condition = (at[name][:, : 2 * n].mT.clone() for name in ("x", "mu", "prompt_mel"))
        condition[..., prompt:] = 0
        mask = torch.ones(1, 1, 2 * n)
        self.model.decoder.estimator(x, mask, mu, at["t"], at["voice"], condition)
        return dict(self.kept)


def hifigan_plain(cfg) -> nn.Module:
    """`SpeechT5HifiGan` of transformers in the sizes of a vocoder.Config, [B, T, M] to [B, W]."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=cfg.mel.num_mels,
            upsample_initial_channel=cfg.initial_channels,
            upsample_rates=cfg.upsample_rates,
            upsample_kernel_sizes=cfg.upsample_kernels,
            resblock_kernel_sizes=cfg.residual_kernels,
            resblock_dilation_sizes=cfg.residual_dilations,
            normalize_before=False,
        )
    )


def hifigan(cfg) -> nn.Module:
    """`hifigan_plain` under the public names, with the norms of weights that public files have."""
    model = hifigan_plain(cfg)
    del model.mean, model.scale  # of its input, which it does not norm
    model.ups = model._modules.pop("upsampler")
    object.__setattr__(
        model, "upsampler", model.ups
    )  # where the forward pass looks; no second name in the state
    for conv in [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]:
        weight_norm(conv)
    return model


def weight_norm(module: nn.Module) -> nn.Module:
    """PyTorch's weight norm in its older form, which stores `weight_g` and `weight_v`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


# ---------------------------------------------------------------- HiFi-GAN (Kong et al., 2020)


class Residual(nn.Module):
    """One residual block: pairs of convolutions (type 1) or single ones (type 2)."""

    def __init__(self, channels: int, size: int, dilations: tuple[int, ...], is_paired: bool):
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            pad = dilation * (size - 1) // 2
            return weight_norm(nn.Conv1d(channels, channels, size, padding=pad, dilation=dilation))

        first = nn.ModuleList(conv(d) for d in dilations)
        if is_paired:
            self.convs1, self.convs2 = first, nn.ModuleList(conv(1) for _ in dilations)
        else:
            self.convs = first
        self.is_paired = is_paired

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, conv in enumerate(self.convs1 if self.is_paired else self.convs):
            y = conv(F.leaky_relu(x, 0.1))
            x = x + (self.convs2[i](F.leaky_relu(y, 0.1)) if self.is_paired else y)
        return x


class Generator(nn.Module):
    """HiFi-GAN's generator in the sizes of a vocoder.Config."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.initial_channels
        self.conv_pre = weight_norm(nn.Conv1d(80, width, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, size in zip(cfg.upsample_rates, cfg.upsample_kernels, strict=True):
            up = nn.ConvTranspose1d(width, width // 2, size, rate, padding=(size - rate) // 2)
            self.ups.append(weight_norm(up))
            width //= 2
            for kernel, dilations in zip(cfg.residual_kernels, cfg.residual_dilations, strict=True):
                self.resblocks.append(Residual(width, kernel, dilations, cfg.is_paired))
        self.conv_post = weight_norm(nn.Conv1d(width, 1, 7, padding=3))
        self.count = len(cfg.residual_kernels)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """[B, 80, T] to [B, W]."""
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(self.resblocks[i * self.count + j](x) for j in range(self.count)) / self.count
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)))[:, 0]


class Period(nn.Module):
    """Discriminator of samples one period apart."""

    def __init__(self, cfg, period: int):
        super().__init__()
        sizes = (1, *cfg.period_channels)
        last = len(cfg.period_channels) - 1
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(sizes[i], sizes[i + 1], (5, 1), (3 if i < last else 1, 1), padding=(2, 0)))
            for i in range(last + 1)
        )
        self.conv_post = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))
        self.period = period

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        """[B, W] to scores [B, 1, W / P / stride, P]."""
        x = F.pad(wav[:, None], (0, -wav.shape[1] % self.period), "reflect")
        x = x.reshape(len(wav), 1, -1, self.period)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.conv_post(x)


class Scale(nn.Module):
    """Discriminator of samples; the first of three has spectral norm."""

    def __init__(self, cfg, norm):
        super().__init__()
        kernels, strides = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1)
        sizes = (1, *cfg.scale_channels)
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(sizes[i], sizes[i + 1], k, s, padding=k // 2, groups=cfg.scale_groups[i]))
            for i, (k, s) in enumerate(zip(kernels, strides, strict=True))
        )
        self.conv_post = norm(nn.Conv1d(sizes[-1], 1, 3, padding=1))

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        """[B, 1, W] to scores [B, 1, W / stride]."""
        for conv in self.convs:
            wav = F.leaky_relu(conv(wav), 0.1)
        return self.conv_post(wav)


class Discriminators(nn.Module):
    """`mpd` and `msd` as two parts of one state dict."""

    def __init__(self, cfg):
        super().__init__()
        norms = [nn.utils.spectral_norm] + [weight_norm] * (cfg.num_scales - 1)
        self.mpd, self.msd = nn.Module(), nn.Module()
        self.mpd.discriminators = nn.ModuleList(Period(cfg, p) for p in cfg.periods)
        self.msd.discriminators = nn.ModuleList(Scale(cfg, norm) for norm in norms)

    def forward(self, wav: torch.Tensor) -> list[torch.Tensor]:
        """[B, W] to one tensor of scores per discriminator, periods first."""
        scores = [d(wav) for d in self.mpd.discriminators]
        wav = wav[:, None]
        for d in self.msd.discriminators:
            scores.append(d(wav))
            wav = F.avg_pool1d(wav, 4, 2, padding=2)
        return scores
