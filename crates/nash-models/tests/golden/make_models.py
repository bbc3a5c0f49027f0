#!/usr/bin/env python3
"""Makes the tiny random models of the golden tests and what `transformers` answers on them.

    python make_models.py [CASE ...]        # needs torch, transformers 4.57, safetensors, gguf, numpy

Writes per case `<case>/config.json`, `<case>/model.safetensors` (rounded to 16 bits; the golden logits are computed in
float32 from the very same rounded values), `<case>/tokens.json`, `<case>/logits.bin` (float32, little-endian,
`[tokens, vocabulary]`) and, where llama.cpp knows the architecture, `<case>/model.gguf` with llama.cpp's conventions
(names, permuted rows, stacked experts, norm weights plus one). Everything follows from the seed of the case.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).parent
VOCAB = 64
TOKENS = 40

SMALL = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MOE = SMALL | dict(intermediate_size=28, num_key_value_heads=4)
TINY = SMALL | dict(hidden_size=32, intermediate_size=32, head_dim=16)
GPT_OSS = dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=7, rope_theta=300.0,
               rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=4.0, beta_slow=1.0, truncate=False,
                                 original_max_position_embeddings=32))
GPT2 = dict(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
OPT = dict(vocab_size=VOCAB, hidden_size=48, ffn_dim=72, num_hidden_layers=2, num_attention_heads=4,
           max_position_embeddings=64, word_embed_proj_dim=48)
GEMMA = SMALL | dict(num_hidden_layers=3, head_dim=18)
SPARSE = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=28, n_shared_experts=2,
              first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True)

# case: (configuration class, its arguments, element type, GGUF architecture or None)
CASES = {
    "llama": ("LlamaConfig", SMALL, torch.float16, "llama"),
    "llama_tied_bias": ("LlamaConfig", SMALL | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                        num_attention_heads=3, num_key_value_heads=1, head_dim=20, rms_norm_eps=1e-5),
                        torch.bfloat16, "llama"),
    "llama_rope3": ("LlamaConfig", SMALL | dict(rope_theta=500.0, rope_scaling=dict(rope_type="llama3", factor=4.0,
                    low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
                    torch.float16, "llama"),
    "llama_linear": ("LlamaConfig", SMALL | dict(rope_scaling=dict(rope_type="linear", factor=2.5)),
                     torch.float16, None),
    "llama_yarn": ("LlamaConfig", SMALL | dict(rope_theta=300.0, rope_scaling=dict(rope_type="yarn", factor=4.0,
                   original_max_position_embeddings=32)), torch.float16, "llama"),
    "mistral_window": ("MistralConfig", SMALL | dict(sliding_window=9, head_dim=20), torch.bfloat16, None),
    "qwen2": ("Qwen2Config", SMALL | dict(num_key_value_heads=1), torch.float16, "qwen2"),
    "qwen2_window": ("Qwen2Config", SMALL | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1,
                     tie_word_embeddings=True), torch.bfloat16, None),
    "qwen3": ("Qwen3Config", SMALL | dict(head_dim=18), torch.float16, "qwen3"),
    "gemma": ("GemmaConfig", GEMMA | dict(num_hidden_layers=2), torch.bfloat16, "gemma"),
    "gemma2": ("Gemma2Config", GEMMA | dict(num_hidden_layers=2, sliding_window=6, query_pre_attn_scalar=18,
               attn_logit_softcapping=4.0, final_logit_softcapping=5.0), torch.bfloat16, "gemma2"),
    "gemma3": ("Gemma3TextConfig", GEMMA | dict(num_hidden_layers=7, intermediate_size=40, sliding_window=8,
               query_pre_attn_scalar=18, rope_theta=50000.0, rope_local_base_freq=100.0), torch.bfloat16, "gemma3"),
    "gemma3_scaled": ("Gemma3TextConfig", GEMMA | dict(sliding_window=16, query_pre_attn_scalar=40,
                      num_key_value_heads=1, sliding_window_pattern=2,
                      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                      rope_scaling=dict(rope_type="linear", factor=8.0)), torch.bfloat16, None),
    "gpt2": ("GPT2Config", GPT2, torch.float16, "gpt2"),
    "gpt2_inner": ("GPT2Config", GPT2 | dict(n_inner=60, n_head=2, activation_function="gelu"),
                   torch.bfloat16, None),
    "opt": ("OPTConfig", OPT, torch.float16, None),
    "opt_after": ("OPTConfig", OPT | dict(do_layer_norm_before=False, enable_bias=False), torch.float16, None),
    "mixtral": ("MixtralConfig", MOE | dict(num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
                torch.float16, "llama"),
    "mixtral_window": ("MixtralConfig", MOE | dict(num_local_experts=5, num_experts_per_tok=1, sliding_window=10),
                       torch.bfloat16, None),
    "qwen2_moe": ("Qwen2MoeConfig", MOE | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=28,
                  shared_expert_intermediate_size=40), torch.float16, "qwen2moe"),
    "qwen2_moe_mixed": ("Qwen2MoeConfig", MOE | dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24,
                        shared_expert_intermediate_size=40, norm_topk_prob=True, num_hidden_layers=3,
                        decoder_sparse_step=2, qkv_bias=False), torch.bfloat16, None),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=28,
                  norm_topk_prob=True, head_dim=24, num_key_value_heads=2), torch.float16, "qwen3moe"),
    "qwen3_moe_mixed": ("Qwen3MoeConfig", MOE | dict(num_experts=6, num_experts_per_tok=4, moe_intermediate_size=24,
                        norm_topk_prob=False, head_dim=16, mlp_only_layers=[0]), torch.bfloat16, None),
    "olmoe": ("OlmoeConfig", MOE | dict(num_experts=8, num_experts_per_tok=3), torch.float16, "olmoe"),
    "olmoe_clip": ("OlmoeConfig", MOE | dict(num_experts=4, num_experts_per_tok=2, clip_qkv=0.7, norm_topk_prob=True,
                   num_key_value_heads=2), torch.bfloat16, None),
    "dots1": ("Dots1Config", MOE | SPARSE | dict(n_group=1, topk_group=1, sliding_window=None), torch.float16,
              "dots1"),
    "dots1_groups": ("Dots1Config", MOE | SPARSE | dict(n_group=4, topk_group=2, attention_bias=True,
                     sliding_window=None, n_shared_experts=1), torch.bfloat16, None),
    "glm4_moe": ("Glm4MoeConfig", MOE | SPARSE | dict(n_group=2, topk_group=1, partial_rotary_factor=0.5,
                 attention_bias=True, use_qk_norm=True, head_dim=16, num_key_value_heads=2), torch.bfloat16, None),
    "glm4_moe_small": ("Glm4MoeConfig", TINY | SPARSE | dict(n_routed_experts=6, moe_intermediate_size=16, n_group=3,
                       topk_group=2, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True,
                       n_shared_experts=1, num_nextn_predict_layers=1), torch.float16, "glm4moe"),
    "glm4_moe_plain": ("Glm4MoeConfig", MOE | SPARSE | dict(n_group=1, topk_group=1, partial_rotary_factor=0.25,
                       norm_topk_prob=False, head_dim=24, first_k_dense_replace=0, num_hidden_layers=1),
                       torch.float16, None),
    "gpt_oss": ("GptOssConfig", TINY | GPT_OSS, torch.float16, "gpt-oss"),
    "gpt_oss_bf16": ("GptOssConfig", TINY | GPT_OSS | dict(layer_types=["full_attention", "sliding_attention"],
                     rope_scaling=None, num_key_value_heads=4, num_experts_per_tok=1), torch.bfloat16, None),
    "gpt_oss_mxfp4": ("GptOssConfig", TINY | GPT_OSS | dict(hidden_size=64, num_local_experts=5, head_dim=8,
                      num_experts_per_tok=3), torch.float16, "gpt-oss"),
}


def randomize(model, dtype, generator):
    """Fills every parameter so that each matters: attention is peaked, norms and biases are not trivial."""
    norm_minus_one = "Gemma" in type(model).__name__
    corrections = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    for name, tensor in list(model.named_parameters()) + corrections:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            # Positive scores: where groups are closed, transformers ranks their experts at 0, not at −∞.
            value = 0.2 * noise.abs()
        elif "norm" in name.lower() or ".ln_" in name or "layer_norm" in name:
            value = 0.2 * noise + (0.0 if norm_minus_one or name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif name.endswith("sinks"):
            value = 2.0 * noise
        elif ".experts." in name and tensor.dim() == 3:
            # Inputs first. Gates and ups that reach the limit of 7.
            value = (4.0 if "gate_up" in name else 0.3) * noise / tensor.shape[1]**0.5
        elif tensor.dim() == 2 and ("embed" in name or "wte" in name or "wpe" in name):
            value = 0.5 * noise
        else:
            fan_in = tensor.shape[0] if type(model).__name__.startswith("GPT2") else tensor.shape[-1]
            value = 1.3 * noise / fan_in**0.5
        tensor.data.copy_(value.to(dtype).to(torch.float32))


def mxfp4(model, generator):
    """Gives the experts weights that MXFP4 can hold; returns the tensors that a folder keeps instead."""
    stored = {}
    for name, tensor in model.named_parameters():
        if ".experts." in name and tensor.dim() == 3:
            experts, inputs, outputs = tensor.shape
            exponent = 125 if "gate_up" in name else 121
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(exponent - 1, exponent + 2, blocks.shape[:3], generator=generator, dtype=torch.uint8)
            tensor.data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored


def permute(weight, heads):
    """Rows of q or k from halves to pairs, as llama.cpp's converter does for the llama family."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{shared}.{kind}_proj": f"ffn_{kind}_shexp" for shared in ("shared_expert", "shared_experts")
       for kind in ("gate", "up", "down")},
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm", "ln_2": "ffn_norm",
}
AFTER_ATTENTION = {"post_attention_layernorm": "post_attention_norm"}
SANDWICH_NAMES = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                  "post_feedforward_layernorm": "post_ffw_norm"}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
EXPERT_KINDS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def ggml_mxfp4(blocks, scales):
    """Blocks of 17 bytes: the scale, then elements 0..16 in the low nibbles and 16..32 in the high ones."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    blocks = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=-1)
    return blocks.reshape(*blocks.shape[:2], -1)


def gpt_oss_tensors(state):
    """What gpt-oss names and keeps in its own way, under GGUF names; MXFP4 as bytes."""
    out = {}
    for name, tensor in state.items():
        kind = name.split(".")[-1]
        block = f"blk.{name.split('.')[2]}" if ".layers." in name else None
        if kind == "sinks":
            out[f"{block}.attn_sinks.weight"] = tensor.float().numpy()
        elif ".experts." in name and not kind.endswith("_scales"):
            property = "bias" if kind.endswith("_bias") else "weight"
            if kind.endswith("_blocks"):
                value = ggml_mxfp4(tensor.numpy(), state[name.replace("_blocks", "_scales")].numpy())
            else:
                value = tensor.float().numpy()
                value = value if property == "bias" else value.swapaxes(1, 2)
            if kind.startswith("down"):
                out[f"{block}.ffn_down_exps.{property}"] = value
            else:
                out[f"{block}.ffn_gate_exps.{property}"] = value[:, 0::2]
                out[f"{block}.ffn_up_exps.{property}"] = value[:, 1::2]
    return out


def gguf_tensors(config, arch, state):
    """The state dictionary under GGUF names and conventions, as float32 arrays."""
    out, experts = {}, {}
    if arch == "gpt-oss":
        out = gpt_oss_tensors(state)
        state = {name: value for name, value in state.items() if "sinks" not in name and ".experts." not in name}
    for name, tensor in state.items():
        value = tensor.float().numpy()
        parts = name.split(".")
        if name.endswith("e_score_correction_bias"):
            out[f"blk.{parts[2]}.exp_probs_b.bias"] = value
            continue
        base, _, kind = name.rpartition(".")
        if base in TOP_NAMES:
            target = TOP_NAMES[base]
        else:
            layer, rest = parts[2], ".".join(parts[3:-1])
            if ".experts." in name:
                number, projection = parts[-3], EXPERT_KINDS[parts[-2]]
                experts.setdefault((layer, projection), {})[int(number)] = value
                continue
            names = LLAMA_NAMES | (SANDWICH_NAMES if arch in ("gemma2", "gemma3") else
                                   AFTER_ATTENTION if arch in ("glm4moe", "gpt-oss") else {})
            target = f"blk.{layer}.{names[rest]}"
            if arch == "gpt2" and kind == "weight" and value.ndim == 2:
                value = value.T
            if arch == "llama" and rest == "self_attn.q_proj":
                value = permute(value, config.num_attention_heads)
            if arch == "llama" and rest == "self_attn.k_proj":
                value = permute(value, config.num_key_value_heads)
        if arch.startswith("gemma") and "norm" in name:
            value = value + 1.0
        out[f"{target}.{kind}"] = value.squeeze() if "shared_expert_gate" in name else value
    for (layer, kind), stack in experts.items():
        out[f"blk.{layer}.ffn_{kind}_exps.weight"] = np.stack([stack[e] for e in range(len(stack))])
    return out


def write_gguf(path, config, arch, state, dtype):
    get = lambda *names: next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)
    writer = gguf.GGUFWriter(path, arch)
    heads = get("num_attention_heads", "n_head")
    width = get("hidden_size", "n_embd")
    further = get("num_nextn_predict_layers") or 0
    writer.add_block_count(get("num_hidden_layers", "n_layer") + further)
    if further:
        writer.add_nextn_predict_layers(further)
    writer.add_context_length(get("max_position_embeddings", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(get("num_key_value_heads") or heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(get("n_inner") or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        dim = get("head_dim") or width // heads
        writer.add_key_length(dim)
        writer.add_value_length(dim)
        if arch != "gpt-oss":
            writer.add_rope_dimension_count(int(dim * (get("partial_rotary_factor") or 1)))
        writer.add_rope_freq_base(config.rope_theta)
    if arch in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_local_base_freq)
    experts = get("num_local_experts", "num_experts", "n_routed_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if arch == "gpt-oss":
            writer.add_expert_feed_forward_length(config.intermediate_size)
        elif get("moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if (get("n_group") or 1) > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if arch in ("dots1", "glm4moe"):
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    tensors = gguf_tensors(config, arch, state)
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(config, scaling)
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if "beta_fast" in scaling:
            writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    for name, value in tensors.items():
        if value.dtype == np.uint8:
            writer.add_tensor(name, np.ascontiguousarray(value), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        elif value.ndim < 2 or name.endswith(".bias"):
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
        elif dtype == torch.float16:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float16))
        else:
            raw = torch.from_numpy(np.ascontiguousarray(value)).bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(config, scaling):
    """Divisors of the rope frequencies, as llama.cpp's converter writes them."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    factors = []
    for j in range(0, dim, 2):
        wave = 2 * np.pi * config.rope_theta ** (j / dim)
        smooth = (scaling["original_max_position_embeddings"] / wave - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"])
        factors.append(1.0 if wave < high else scaling["factor"] if wave > low
                       else 1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def make(case):
    kind, arguments, dtype, arch = CASES[case]
    seed = zlib.crc32(case.encode())
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, kind)(**arguments)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    model.eval()
    randomize(model, dtype, generator)
    stored = mxfp4(model, generator) if case.endswith("mxfp4") else {}
    tokens = torch.randint(0, VOCAB, (1, TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits[0]
    folder = HERE / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config.architectures = [type(model).__name__]
    if stored:
        config.quantization_config = dict(quant_method="mxfp4", modules_to_not_convert=[
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"])
    (folder / "config.json").write_text(config.to_json_string())
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    state = {name: tensor for name, tensor in model.state_dict().items() if name != tied and "inv_freq" not in name}
    state = {name: tensor for name, tensor in state.items() if f"{name}_blocks" not in stored} | stored
    # Clones: safetensors refuses tensors that share memory.
    save_file({name: (tensor if name in stored else tensor.to(dtype)).clone().contiguous() for name, tensor in state.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokens.json").write_text(json.dumps(tokens[0].tolist()))
    (folder / "logits.bin").write_bytes(logits.numpy().astype("<f4").tobytes())
    if arch:
        write_gguf(folder / "model.gguf", config, arch, state, dtype)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{case}: {type(model).__name__}, {size} bytes, logits std {logits.std():.3f}")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
