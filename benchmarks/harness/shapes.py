"""The tensors of real architectures, by name and shape, and the config.json that goes with them."""

from dataclasses import dataclass

from harness.safetensors_stream import Shapes

IMAGE = 224
CLASSES = 1000


@dataclass(frozen=True)
class ViT:
    """An image classifier: 16 tensors a layer, patches, positions, a head."""

    hidden: int
    layers: int
    heads: int
    patch: int

    def shapes(self) -> Shapes:
        h, inner = self.hidden, 4 * self.hidden
        shapes: Shapes = {
            "vit.embeddings.cls_token": (1, 1, h),
            "vit.embeddings.position_embeddings": (1, (IMAGE // self.patch) ** 2 + 1, h),
            "vit.embeddings.patch_embeddings.projection.weight": (h, 3, self.patch, self.patch),
            "vit.embeddings.patch_embeddings.projection.bias": (h,),
        }
        for layer in range(self.layers):
            prefix = f"vit.encoder.layer.{layer}."
            dense = [(f"attention.attention.{part}", h, h) for part in ("query", "key", "value")]
            dense += [("attention.output.dense", h, h)]
            dense += [("intermediate.dense", inner, h), ("output.dense", h, inner)]
            for name, rows, columns in dense:
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                shapes[f"{prefix}{name}.bias"] = (rows,)
            for name in ("layernorm_before", "layernorm_after"):
                shapes |= {f"{prefix}{name}.weight": (h,), f"{prefix}{name}.bias": (h,)}
        shapes |= {"vit.layernorm.weight": (h,), "vit.layernorm.bias": (h,)}
        return shapes | {"classifier.weight": (CLASSES, h), "classifier.bias": (CLASSES,)}

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.hidden,
            "image_size": IMAGE,
            "patch_size": self.patch,
        }


@dataclass(frozen=True)
class Llama:
    """A causal language model with grouped keys and an untied head: 9 tensors a layer."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int

    def shapes(self) -> Shapes:
        h, keys = self.hidden, self.hidden // self.heads * self.key_heads
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                f"{prefix}self_attn.q_proj.weight": (h, h),
                f"{prefix}self_attn.k_proj.weight": (keys, h),
                f"{prefix}self_attn.v_proj.weight": (keys, h),
                f"{prefix}self_attn.o_proj.weight": (h, h),
                f"{prefix}mlp.gate_proj.weight": (self.inner, h),
                f"{prefix}mlp.up_proj.weight": (self.inner, h),
                f"{prefix}mlp.down_proj.weight": (h, self.inner),
                f"{prefix}input_layernorm.weight": (h,),
                f"{prefix}post_attention_layernorm.weight": (h,),
            }
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }
