"""Networks of the zoo: published architectures with random weights, on small inputs. See zoo.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.zoo import ZOO as TRAPS

__all__ = ["NETWORKS", "QUICK", "Network"]

Built: TypeAlias = "tuple[nn.Module, tuple[Any, ...], dict[str, Any]]"


@dataclass(frozen=True)
class Network:
    """One network: its family, and a function that builds it with the arguments of one call."""

    family: str
    build: Callable[[], Built]


def images(size: int = 64, samples: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(samples, channels, size, size)


def of_timm(name: str, size: int, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)
        return model, (images(size),), {}

    return build


def of_torchvision(name: str, size: int, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        model = importlib.import_module("torchvision.models").get_model(name, weights=None, **options)
        return model, (images(size),), {}

    return build


def video(name: str, frames: int, size: int) -> Callable[[], Built]:
    def build() -> Built:
        model = importlib.import_module("torchvision.models").get_model(name, weights=None, num_classes=10)
        return model, (torch.randn(2, 3, frames, size, size),), {}

    return build


def flow() -> Built:
    return _torchvision("raft_small", num_flow_updates=2), (images(128), images(128)), {}


def _torchvision(name: str, **options: Any) -> nn.Module:
    built = importlib.import_module("torchvision.models").get_model(name, weights=None)

    class Fixed(nn.Module):
        """Call a model with constant options."""

        def __init__(self) -> None:
            super().__init__()
            self.model = built

        def forward(self, *images: Tensor) -> Any:
            return self.model(*images, **options)

    return Fixed() if options else built


def detection_trunk(name: str) -> Callable[[], Built]:
    """The backbone, pyramid and head of a detector, before boxes are decoded."""

    class Trunk(nn.Module):
        def __init__(self, detector: Any) -> None:
            super().__init__()
            self.backbone, self.head = (
                detector.backbone,
                detector.head if hasattr(detector, "head") else detector.rpn.head,
            )

        def forward(self, x: Tensor) -> Any:
            return self.head(list(self.backbone(x).values()))

    def build() -> Built:
        options = {} if name.startswith("ssd") else {"num_classes": 5}
        model = importlib.import_module("torchvision.models").get_model(
            name, weights=None, weights_backbone=None, **options
        )
        return Trunk(model), (images(128),), {}

    return build


def of_smp(name: str, encoder: str = "resnet18", **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        smp = importlib.import_module("segmentation_models_pytorch")
        model = getattr(smp, name)(encoder, encoder_weights=None, classes=4, **options)
        return model, (images(64),), {}

    return build


TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


class OneOutput(nn.Module):
    """Return the logits of a model of ``transformers``, or its last hidden state, alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        out = self.model(**inputs)
        return next(out[name] for name in ("logits", "logits_per_image", "last_hidden_state") if name in out)


def of_transformers(
    kind: str, head: str = "", inputs: str = "text", options: dict[str, Any] | None = None
) -> Callable[[], Built]:
    """A model of ``transformers`` with a small configuration, called for its logits or its last hidden state."""

    def build() -> Built:
        library = importlib.import_module("transformers")
        sizes = TEXT_SIZES if inputs == "text" and options is None else options or {}
        config = library.AutoConfig.for_model(kind, **sizes)
        config.use_cache, config._experts_implementation = False, "eager"
        model = getattr(library, f"AutoModel{head}").from_config(config, attn_implementation="eager")
        return OneOutput(model), (), _inputs(inputs)

    return build


def _inputs(kind: str) -> dict[str, Any]:
    tokens = torch.randint(1, 90, (2, 12))
    return {
        "text": {"input_ids": tokens},
        "pair": {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]},
        "image": {"pixel_values": images(32)},
        "image64": {"pixel_values": images(64)},
        "speech": {"input_values": torch.randn(2, 2000)},
        "spectrogram": {"input_values": torch.randn(2, 64, 32)},
        "whisper": {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": tokens[:, :7]},
        "both": {"input_ids": tokens, "pixel_values": images(32)},
        "series": {"past_values": torch.randn(2, 32, 3)},
        "video": {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    }[kind]


def sizes(**others: Any) -> dict[str, Any]:
    return TEXT_SIZES | others


DECODER = sizes(num_key_value_heads=2)
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
T5: dict[str, Any] = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
SPEECH: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = BART | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64, "pad_token_id": 0}
CLIP: dict[str, Any] = {"text_config": TEXT_SIZES, "vision_config": VISION, "projection_dim": 32}


class Sequences(nn.Module):
    """A recurrent classifier."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 32)
        self.recurrent = getattr(nn, kind)(32, 48, batch_first=True, **options)
        self.head = nn.Linear(options.get("proj_size", 48) * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.table(tokens))[0].mean(1))


class Cells(nn.Module):
    """A recurrent cell, called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hidden, self.head = nn.LSTMCell(16, 32), 32, nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden), x.new_zeros(x.shape[0], self.hidden)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


class Waveforms(nn.Module):
    """M5: convolutions on a waveform."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, size, stride in ((1, width, 80, 4), (width, width, 3, 1), (width, 2 * width, 3, 1)):
            layers += [nn.Conv1d(inputs, outputs, size, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(-1))


class Separator(nn.Module):
    """Conv-TasNet: an encoder, masks from dilated depthwise convolutions, a decoder."""

    def __init__(self, width: int = 32, speakers: int = 2) -> None:
        super().__init__()
        self.speakers, self.width = speakers, width
        self.encoder, self.decoder = nn.Conv1d(1, width, 16, 8), nn.ConvTranspose1d(width, 1, 16, 8)
        self.inner = nn.Conv1d(width, 24, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(24, 48, 1),
                nn.PReLU(),
                nn.GroupNorm(1, 48),
                nn.Conv1d(48, 48, 3, padding=2**i, dilation=2**i, groups=48),
                nn.PReLU(),
                nn.GroupNorm(1, 48),
                nn.Conv1d(48, 24, 1),
            )
            for i in range(3)
        )
        self.masks = nn.Conv1d(24, speakers * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.encoder(x))
        y = self.inner(features)
        for block in self.blocks:
            y = y + block(y)
        masks = self.masks(y).view(x.shape[0], self.speakers, self.width, -1).sigmoid()
        sources = (masks * features[:, None]).flatten(0, 1)
        return self.decoder(sources).view(x.shape[0], self.speakers, -1)


class Generator(nn.Module):
    """A generator: a linear layer makes the first map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32 * 4 * 4)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 3, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(self.first(z).view(-1, 32, 4, 4)).tanh()


class Dictionaries(nn.Module):
    """Tables and numbers in a dictionary, two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({"user": nn.Embedding(20, 16), "item": nn.Embedding(30, 16)})
        self.numbers = nn.Linear(4, 16)
        self.body = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleDict({"click": nn.Linear(32, 1), "time": nn.Linear(32, 1)})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [table(batch[name]) for name, table in self.tables.items()]
        y = self.body(torch.cat([*parts, self.numbers(batch["numbers"])], dim=-1))
        return {name: head(y) for name, head in self.heads.items()}


def dictionaries() -> Built:
    batch = {"user": torch.randint(20, (4,)), "item": torch.randint(30, (4,)), "numbers": torch.randn(4, 4)}
    return Dictionaries(), (batch,), {}


def own(build: Callable[[], nn.Module], *shape: int, tokens: bool = False) -> Callable[[], Built]:
    return lambda: (build(), (torch.randint(90, shape) if tokens else torch.randn(shape),), {})


def torch_transformer() -> Built:
    model = nn.Transformer(32, 4, 2, 2, 48, batch_first=True)
    return model, (torch.randn(2, 9, 32), torch.randn(2, 7, 32)), {}


def trap(name: str) -> Callable[[], Built]:
    def build() -> Built:
        net = TRAPS[name]()
        return net, *net.example

    return build


OWN: dict[str, Callable[[], Built]] = {
    "lstm": own(lambda: Sequences("LSTM", num_layers=2), 2, 12, tokens=True),
    "lstm, both directions": own(lambda: Sequences("LSTM", bidirectional=True), 2, 12, tokens=True),
    "lstm with projections": own(lambda: Sequences("LSTM", proj_size=24), 2, 12, tokens=True),
    "gru": own(lambda: Sequences("GRU", num_layers=2), 2, 12, tokens=True),
    "rnn": own(lambda: Sequences("RNN"), 2, 12, tokens=True),
    "lstm cell": own(Cells, 2, 6, 16),
    "nn.Transformer": torch_transformer,
    "M5": own(Waveforms, 2, 1, 2000),
    "Conv-TasNet": own(Separator, 2, 1, 400),
    "generator": own(Generator, 2, 16),
    "dictionaries": dictionaries,
}

_TIMM = """
    resnet18 resnext26ts resnetv2_18 legacy_seresnet18 skresnet18 resnest14d ecaresnet26t res2net50_26w_4s
    regnetx_002 regnety_002 densenet121 dla46_c dpn48b efficientnet_b0 mixnet_s mobilenetv3_small_050
    mobilenetv4_conv_small_050 fbnetv3_b lcnet_050 tinynet_e ghostnet_050 ghostnetv2_100 hgnet_tiny hrnet_w18_small
    repghostnet_050 repvgg_a0 repvit_m0_9 mobileone_s0 rexnet_100 selecsls42 cs3darknet_focus_s ese_vovnet19b_dw
    xception41 inception_v4 nf_resnet26 eca_nfnet_l0 tresnet_m fasternet_t0 starnet_s1 inception_next_atto
    convnext_atto convnextv2_atto convmixer_768_32 mambaout_femto rdnet_tiny focalnet_tiny_srf poolformer_s12
    caformer_s18 efficientvit_b0 edgenext_xx_small fastvit_t8 mobilevit_xxs mobilevitv2_050 shvit_s1 swiftformer_xs
    pvt_v2_b0 halonet26t lowformer_b0 davit_tiny twins_svt_small
    tiny_vit_5m_224
"""
_TIMM_TOKENS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 4},
    "vit_relpos_small_patch16_224": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "eva02_tiny_patch14_224": {"depth": 2, "patch_size": 16},
    "cait_xxs24_224": {"depth": 2},
    "mixer_s32_224": {},
    "resmlp_12_224": {},
    "gmlp_ti16_224": {},
    "convit_tiny": {"depth": 4},
    "xcit_nano_12_p16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (3, 6), "window_size": 4},
    "swinv2_cr_tiny_ns_224": {"depths": (2, 2), "num_heads": (3, 6), "window_size": 4},
    "pit_ti_224": {},
    "tnt_s_patch16_224": {"depth": 2},
    "coat_lite_tiny": {},
    "levit_128s": {},
    "visformer_tiny": {},
    "efficientformerv2_s0": {},
    "mvitv2_tiny": {},
    "coatnet_nano_rw_224": {},
    "volo_d1_224": {},
    "hiera_tiny_224": {},
    "efficientvit_m0": {},
}
_TORCHVISION = """
    resnet50 squeezenet1_1 googlenet shufflenet_v2_x0_5 mobilenet_v2 mnasnet0_5 efficientnet_v2_s convnext_tiny
"""

NETWORKS: dict[str, Network] = {
    **{f"torchvision/{name}": Network("torchvision", of_torchvision(name, 64)) for name in _TORCHVISION.split()},
    **{
        f"timm/{name}": Network("timm, maps", of_timm(name, {"inception_v4": 96, "halonet26t": 256}.get(name, 64)))
        for name in _TIMM.split()
    },
    **{
        f"timm/{name}": Network("timm, tokens", of_timm(name, 64, img_size=64, **options))
        for name, options in _TIMM_TOKENS.items()
    },
    **{
        f"segmentation/{name}": Network("segmentation", build)
        for name, build in {
            "Unet": of_smp("Unet"),
            "Unet, scSE": of_smp("Unet", decoder_attention_type="scse"),
            "MAnet": of_smp("MAnet"),
            "Linknet": of_smp("Linknet"),
            "FPN": of_smp("FPN"),
            "DeepLabV3+": of_smp("DeepLabV3Plus"),
            "Segformer": of_smp("Segformer", "mit_b0"),
            "Unet, MobileNetV2": of_smp("Unet", "mobilenet_v2"),
            "DeepLabV3": of_torchvision("deeplabv3_mobilenet_v3_large", 64, weights_backbone=None),
            "LR-ASPP": of_torchvision("lraspp_mobilenet_v3_large", 64, weights_backbone=None),
        }.items()
    },
    **{
        f"detection/{name}": Network("detection trunks", detection_trunk(name))
        for name in ("fcos_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn")
    },
    "detection/ssdlite320": Network("detection trunks", detection_trunk("ssdlite320_mobilenet_v3_large")),
    **{
        f"video/{name}": Network("video and flow", video(name, *shape))
        for name, shape in {
            "r3d_18": (4, 32),
            "r2plus1d_18": (4, 32),
            "mc3_18": (4, 32),
            "swin3d_t": (4, 32),
        }.items()
    },
    "video/raft_small": Network("video and flow", flow),
    **{
        f"transformers/{name}": Network("transformers", build)
        for name, build in {
            "BERT": of_transformers("bert"),
            "BERT, classifier": of_transformers("bert", "ForSequenceClassification"),
            "RoBERTa": of_transformers("roberta", "ForSequenceClassification", options=sizes(pad_token_id=1)),
            "DistilBERT": of_transformers(
                "distilbert",
                "ForSequenceClassification",
                options={"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
            ),
            "ALBERT": of_transformers("albert", "ForSequenceClassification", options=sizes(embedding_size=32)),
            "ELECTRA": of_transformers("electra", "ForSequenceClassification", options=sizes(embedding_size=32)),
            "DeBERTa-v2": of_transformers(
                "deberta-v2",
                "ForSequenceClassification",
                options=sizes(relative_attention=True, pos_att_type=["p2c", "c2p"]),
            ),
            "MPNet": of_transformers("mpnet", "ForSequenceClassification", options=sizes(pad_token_id=1)),
            "ModernBERT": of_transformers("modernbert", "ForSequenceClassification"),
            "SqueezeBERT": of_transformers(
                "squeezebert", "ForSequenceClassification", options=sizes(embedding_size=64)
            ),
            "MobileBERT": of_transformers(
                "mobilebert",
                "ForSequenceClassification",
                options=sizes(intra_bottleneck_size=32, embedding_size=32, true_hidden_size=32),
            ),
            "FNet": of_transformers("fnet", "ForSequenceClassification"),
            "GPT-2": of_transformers(
                "gpt2", "ForCausalLM", options={"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
            ),
            "GPT-Neo": of_transformers(
                "gpt_neo",
                "ForCausalLM",
                options={
                    "vocab_size": 96,
                    "hidden_size": 64,
                    "num_layers": 2,
                    "num_heads": 4,
                    "attention_types": [[["global", "local"], 1]],
                },
            ),
            "GPT-NeoX": of_transformers("gpt_neox", "ForCausalLM"),
            "OPT": of_transformers(
                "opt",
                "ForCausalLM",
                options=sizes(ffn_dim=96, word_embed_proj_dim=64),
            ),
            "BLOOM": of_transformers(
                "bloom", "ForCausalLM", options={"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}
            ),
            "Phi": of_transformers("phi", "ForCausalLM", options=DECODER),
            "Llama": of_transformers("llama", "ForCausalLM", options=DECODER),
            "Mistral": of_transformers("mistral", "ForCausalLM", options=DECODER),
            "Mixtral": of_transformers(
                "mixtral", "ForCausalLM", options=DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
            ),
            "Qwen2": of_transformers("qwen2", "ForCausalLM", options=DECODER),
            "Qwen3": of_transformers("qwen3", "ForCausalLM", options=DECODER | {"head_dim": 16}),
            "Gemma": of_transformers("gemma", "ForCausalLM", options=DECODER | {"head_dim": 16}),
            "Falcon": of_transformers("falcon", "ForCausalLM"),
            "Mamba": of_transformers(
                "mamba", "ForCausalLM", options={"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
            ),
            "T5": of_transformers("t5", "ForSeq2SeqLM", "pair", T5),
            "T5, gated": of_transformers("t5", "ForSeq2SeqLM", "pair", T5 | {"feed_forward_proj": "gated-gelu"}),
            "BART": of_transformers("bart", "ForSeq2SeqLM", "pair", BART),
            "Pegasus": of_transformers("pegasus", "ForSeq2SeqLM", "pair", BART),
            "Marian": of_transformers(
                "marian", "ForSeq2SeqLM", "pair", BART | {"pad_token_id": 0, "decoder_start_token_id": 1}
            ),
            "ViT": of_transformers("vit", "ForImageClassification", "image", VISION),
            "BEiT": of_transformers("beit", "ForImageClassification", "image", VISION),
            "DINOv2": of_transformers("dinov2", "", "image", VISION),
            "Swin": of_transformers(
                "swin",
                "ForImageClassification",
                "image64",
                {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
            ),
            "ConvNeXt": of_transformers(
                "convnext",
                "ForImageClassification",
                "image64",
                {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
            ),
            "SegFormer": of_transformers(
                "segformer",
                "ForSemanticSegmentation",
                "image64",
                {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
            ),
            "MobileViT": of_transformers(
                "mobilevit", "ForImageClassification", "image64", {"image_size": 64, "hidden_sizes": [32, 48, 64]}
            ),
            "ResNet": of_transformers(
                "resnet",
                "ForImageClassification",
                "image64",
                {"hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]},
            ),
            "CLIP": of_transformers("clip", "", "both", CLIP),
            "SigLIP": of_transformers(
                "siglip", "", "both", CLIP | {"text_config": TEXT_SIZES | {"projection_size": 64}}
            ),
            "VideoMAE": of_transformers("videomae", "", "video", VISION | {"num_frames": 4, "tubelet_size": 2}),
            "PatchTST": of_transformers(
                "patchtst",
                "",
                "series",
                {
                    "num_input_channels": 3,
                    "context_length": 32,
                    "patch_length": 8,
                    "patch_stride": 8,
                    "d_model": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "ffn_dim": 48,
                },
            ),
        }.items()
    },
    **{
        f"audio/{name}": Network("audio", build)
        for name, build in {
            "Wav2Vec2": of_transformers("wav2vec2", "", "speech", SPEECH),
            "HuBERT": of_transformers("hubert", "", "speech", SPEECH),
            "WavLM": of_transformers("wavlm", "", "speech", SPEECH),
            "Whisper": of_transformers("whisper", "ForSpeechSeq2Seq", "whisper", WHISPER),
            "AST": of_transformers(
                "audio-spectrogram-transformer",
                "ForAudioClassification",
                "spectrogram",
                {**VISION, "max_length": 64, "num_mel_bins": 32},
            ),
            "M5": OWN["M5"],
            "Conv-TasNet": OWN["Conv-TasNet"],
        }.items()
    },
    **{
        f"recurrent/{name}": Network("recurrent", OWN[name]) for name in OWN if "lstm" in name or name in {"gru", "rnn"}
    },
    **{f"others/{name}": Network("others", OWN[name]) for name in ("nn.Transformer", "generator", "dictionaries")},
}

QUICK: dict[str, Network] = {
    **{
        name: NETWORKS[name]
        for name in ("recurrent/gru", "recurrent/lstm cell", "others/generator", "others/dictionaries")
    },
    **{f"traps/{name}": Network("traps", trap(name)) for name in ("unet", "fused_qkv", "grouped", "convnext")},
}
"""Networks that need no further package."""
