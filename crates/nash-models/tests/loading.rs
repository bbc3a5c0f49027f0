//! Bad models are refused with an error that names the place; packed folders load and compute.

#![expect(clippy::unwrap_used, reason = "a test says by panicking that it failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use nash_core::gguf_write::GgufWriter;
use nash_core::packed_write::{PackedLayout, PackedWriter, TensorSpec};
use nash_core::{DType, Gguf, ModelFile, gguf};
use nash_kernels::{PackedMatrix, PackedShape, Unpacked, Width, dequantize_row, pack};
use nash_models::{DenseLinear, Input, KvCache, Linear, Model, ModelConfig, ModelError, VocabParts};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn model(name: &str) -> Model {
    Model::load(&ModelFile::open(golden(name)).unwrap()).unwrap()
}

/// What loading says after keys of `config.json` were changed.
fn load_changed(name: &str, changes: &[(&str, Value)]) -> Result<Model, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read(golden(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(
        golden(name).join("model.safetensors"),
        dir.path().join("model.safetensors"),
    )
    .unwrap();
    Model::load(&ModelFile::open(dir.path()).unwrap())
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(model.config(), tokens.len());
    let hidden = model.forward(tokens, &mut cache, &mut ()).unwrap();
    let mut out = vec![0.0; tokens.len() * model.config().vocab_size];
    model.logits(&hidden, &mut out, &mut ());
    out
}

#[test]
fn missing_tensors_are_named_with_what_was_tried() {
    let error = load_changed("llama", &[("num_hidden_layers", json!(3))]).unwrap_err();
    assert!(matches!(error, ModelError::MissingTensor { .. }), "{error}");
    let text = error.to_string();
    for part in [
        "model.layers.2.self_attn.q_proj.weight",
        "layers.2.self_attn.q_proj",
        "download",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let error = load_changed("qwen2_moe", &[("num_experts", json!(7))]).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::WrongShape { .. } | ModelError::MissingTensor { .. }
        ),
        "{error}"
    );
}

#[test]
fn weights_of_other_quantizers_are_refused() {
    let gptq = json!({"quant_method": "gptq", "bits": 4});
    let error = load_changed("llama", &[("quantization_config", gptq)]).unwrap_err();
    assert!(error.to_string().contains("gptq"), "{error}");
}

#[test]
fn wrong_shapes_are_named_with_both_shapes() {
    let error = load_changed("llama", &[("intermediate_size", json!(80))]).unwrap_err();
    let ModelError::WrongShape {
        file,
        tensor,
        expected,
        found,
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(
        (expected.as_slice(), found.as_slice()),
        (&[80, 48][..], &[72, 48][..])
    );
    assert_eq!(tensor, "model.layers.0.mlp.gate_proj.weight");
    assert!(!file.is_empty());
    for (name, key, value) in [
        ("gpt2", "n_embd", 24),
        ("gpt2", "n_positions", 65),
        ("opt", "ffn_dim", 71),
        ("llama", "vocab_size", 63),
    ] {
        let error = load_changed(name, &[(key, json!(value))]).unwrap_err();
        assert!(
            matches!(error, ModelError::WrongShape { .. }),
            "{name} {key}: {error}"
        );
    }
}

#[test]
fn lying_sizes_do_not_overflow() {
    for key in [
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
    ] {
        for value in [0u64, 1 << 27, 1 << 40, u64::MAX] {
            assert!(
                load_changed("llama", &[(key, json!(value))]).is_err(),
                "{key} = {value}"
            );
        }
    }
}

/// Loads a GGUF file after a key of its metadata was set (or removed) and a tensor was left out.
fn load_gguf_changed(
    name: &str,
    key: &str,
    value: Option<gguf::Value>,
    without: &str,
) -> Result<Model, ModelError> {
    let source = Gguf::open(golden(name).join("model.gguf")).unwrap();
    let mut writer = GgufWriter::new();
    for (k, v) in source.metadata().iter().filter(|(k, _)| *k != key) {
        writer = writer.metadata(k.clone(), v.clone());
    }
    if let Some(value) = value {
        writer = writer.metadata(key, value);
    }
    for tensor in source.tensors().iter().filter(|tensor| tensor.name != without) {
        writer = writer.tensor(tensor.clone());
    }
    Model::load(&ModelFile::Gguf(
        Gguf::from_bytes(writer.to_bytes().unwrap()).unwrap(),
    ))
}

#[test]
fn gguf_metadata_that_is_wrong_or_missing_is_named() {
    use gguf::Value;
    let fails = |name: &str, key: &str, value: Option<Value>| {
        load_gguf_changed(name, key, value, "")
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(
        load_gguf_changed("llama", "", None, "").is_ok(),
        "the copy itself loads"
    );
    let text = fails(
        "llama",
        "general.architecture",
        Some(Value::String("rwkv7".into())),
    );
    assert!(text.contains("rwkv7") && text.contains("qwen3moe"), "{text}");
    for key in [
        "embedding_length",
        "block_count",
        "context_length",
        "attention.head_count",
    ] {
        assert!(fails("llama", &format!("llama.{key}"), None).contains(key));
        for value in [0, 1 << 40, u64::MAX] {
            let text = fails("llama", &format!("llama.{key}"), Some(Value::U64(value)));
            // A long context is not wrong by itself.
            assert!(!text.is_empty(), "{key} = {value}");
        }
    }
    let eps = "llama.attention.layer_norm_rms_epsilon";
    assert!(fails("llama", eps, Some(Value::F32(f32::NAN))).contains("eps"));
    let scaling = Some(Value::String("longrope".into()));
    assert!(fails("llama", "llama.rope.scaling.type", scaling).contains("longrope"));
    assert!(fails("mixtral", "llama.expert_used_count", Some(Value::U32(5))).contains("5 of 4"));
    assert!(fails("mixtral", "llama.expert_count", Some(Value::U32(3))).contains("[4, 48]"));
    let gating = fails("qwen2_moe", "qwen2moe.expert_gating_func", Some(Value::U32(9)));
    assert!(gating.contains("gating function 9"), "{gating}");
}

#[test]
fn missing_gguf_tensors_are_named_both_ways() {
    let error = load_gguf_changed("llama", "", None, "blk.1.ffn_down.weight")
        .map(|_| ())
        .unwrap_err();
    let ModelError::MissingTensor { tensor, tried, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(tensor, "model.layers.1.mlp.down_proj.weight");
    assert!(tried.contains("blk.1.ffn_down.weight"), "{tried}");
    let error = load_gguf_changed("llama", "", None, "token_embd.weight")
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("token_embd.weight"), "{error}");
    // Without an output matrix the embedding is the output: another model, but a whole one.
    assert!(
        load_gguf_changed("llama", "", None, "output.weight")
            .unwrap()
            .config()
            .tie_embeddings
    );
}

#[test]
fn nan_and_infinity_are_found_where_they_are() {
    let mut model = model("llama");
    model.check_finite().unwrap();
    let name = "model.layers.1.mlp.up_proj";
    for value in [f32::NAN, f32::INFINITY] {
        let mut w = vec![0.5; 72 * 48];
        w[71 * 48 + 3] = value;
        w[70 * 48 + 5] = value;
        model
            .set_linear(name, Arc::new(DenseLinear::new(w, 72, 48)))
            .unwrap();
        let error = model.check_finite().unwrap_err();
        let ModelError::NotFinite { tensor, row, col, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!((tensor.as_str(), *row, *col), (name, 70, 5));
    }
}

#[test]
fn set_linear_checks_name_and_shape_and_takes_effect() {
    let mut model = model("llama");
    let tokens = [3, 1, 4, 1, 5];
    let before = logits(&model, &tokens);
    // The same weight in another form changes nothing but rounding; another weight does.
    let name = "model.layers.0.self_attn.v_proj";
    let old = Arc::clone(model.linear(name).unwrap());
    let mut w = vec![0.0; old.rows() * old.cols()];
    w.chunks_exact_mut(old.cols())
        .enumerate()
        .for_each(|(r, row)| old.row(r, row));
    model
        .set_linear(
            name,
            Arc::new(DenseLinear::new(w.clone(), old.rows(), old.cols())),
        )
        .unwrap();
    let same = logits(&model, &tokens);
    assert!(before.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-4));
    w.iter_mut().for_each(|v| *v = -*v);
    model
        .set_linear(name, Arc::new(DenseLinear::new(w, old.rows(), old.cols())))
        .unwrap();
    assert!(
        before
            .iter()
            .zip(logits(&model, &tokens))
            .any(|(a, b)| (a - b).abs() > 1e-2)
    );

    let wrong = || Arc::new(DenseLinear::new(vec![0.0; 48], 1, 48));
    assert!(matches!(
        model.set_linear(name, wrong()),
        Err(ModelError::WrongShape { .. })
    ));
    assert!(matches!(
        model.set_linear("model.layers.9.x", wrong()),
        Err(ModelError::NoSuchLinear { .. })
    ));
}

#[test]
fn misuse_of_the_cache_is_an_error_and_computes_nothing() {
    let llama = model("llama");
    let mut cache = KvCache::new(llama.config(), 8);
    llama.forward(&[1, 2, 3], &mut cache, &mut ()).unwrap();
    let error = llama.forward(&[1; 6], &mut cache, &mut ()).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::ContextOverflow {
                needed: 9,
                capacity: 8
            }
        ),
        "{error}"
    );
    let error = llama.forward(&[64], &mut cache, &mut ()).unwrap_err();
    assert!(
        matches!(error, ModelError::TokenOutOfRange { id: 64, vocab: 64 }),
        "{error}"
    );
    assert_eq!(cache.tokens(), [1, 2, 3]);
    let mut other = KvCache::new(model("gemma3").config(), 8);
    assert!(matches!(
        llama.forward(&[1], &mut other, &mut ()),
        Err(ModelError::CacheMismatch { .. })
    ));
    let mut none = KvCache::new(llama.config(), 0);
    assert!(matches!(
        llama.forward(&[1], &mut none, &mut ()),
        Err(ModelError::ContextOverflow { .. })
    ));
    assert!(llama.forward(&[], &mut cache, &mut ()).unwrap().is_empty());
    // Learned positions end where the table ends, however large the cache.
    let gpt2 = model("gpt2");
    let mut cache = KvCache::new(gpt2.config(), 100);
    let error = gpt2.forward(&[0; 65], &mut cache, &mut ()).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::ContextOverflow {
                needed: 65,
                capacity: 64
            }
        ),
        "{error}"
    );
}

/// Packs a matrix at 8 bits, one scale per row.
fn pack8(w: &[f32], rows: usize, cols: usize) -> PackedMatrix {
    let shape = PackedShape {
        rows,
        cols,
        width: Width::new(8).unwrap(),
    };
    let unpacked = |codes: Vec<u8>, row_scales: Vec<f16>| Unpacked {
        codes,
        scale_codes: vec![1; rows * shape.groups()],
        row_scales,
        codebook: vec![],
    };
    // What one step is worth at row scale 1, from the decoder itself.
    let probe = pack(shape, &unpacked(vec![129; rows * cols], vec![f16::ONE; rows])).unwrap();
    let mut decoded = vec![0.0; cols];
    dequantize_row(probe.as_ref(), 0, &mut decoded);
    let unit = decoded[0];
    let mut codes = Vec::new();
    let mut scales = Vec::new();
    for row in w.chunks_exact(cols) {
        let max = row.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        let scale = f16::from_f32(max / (126.0 * unit));
        scales.push(scale);
        let step = scale.to_f32() * unit;
        codes.extend(
            row.iter()
                .map(|v| ((v / step).round().clamp(-127.0, 127.0) + 128.0) as u8),
        );
    }
    pack(shape, &unpacked(codes, scales)).unwrap()
}

/// Writes all linears of a model with eight bits.
fn write_packed(source: &Model, dir: &Path) {
    let width = Width::new(8).unwrap();
    let packed = source.linears().into_iter().map(|info| TensorSpec::Packed {
        name: info.name,
        shape: PackedShape {
            rows: info.rows,
            cols: info.cols,
            width,
        },
    });
    let floats = source.float_tensors();
    let plain = floats.iter().map(|(name, shape, _)| TensorSpec::Float {
        name: name.clone(),
        dtype: DType::F32,
        shape: shape.clone(),
    });
    let layout = PackedLayout::new(packed.chain(plain)).unwrap();
    let mut writer = PackedWriter::create(dir, layout).unwrap();
    for info in source.linears() {
        let linear = source.linear(&info.name).unwrap();
        let mut w = vec![0.0; info.rows * info.cols];
        w.chunks_exact_mut(info.cols)
            .enumerate()
            .for_each(|(r, row)| linear.row(r, row));
        writer
            .packed(&info.name, pack8(&w, info.rows, info.cols).as_ref())
            .unwrap();
    }
    for (name, _, values) in &floats {
        writer.float(name, values).unwrap();
    }
    let config = json!({"model_type": "any", "nashswarm_model": source.config()});
    writer
        .finish(config.as_object().unwrap().clone(), serde_json::Map::new())
        .unwrap();
}

#[test]
fn a_packed_folder_loads_and_agrees_with_its_source() {
    for name in [
        "llama",
        "gemma3",
        "gpt2",
        "opt",
        "qwen2_moe",
        "dots1",
        "gpt_oss_mxfp4",
    ] {
        let source = model(name);
        let dir = tempfile::tempdir().unwrap();
        write_packed(&source, dir.path());
        let loaded = Model::load(&ModelFile::open(dir.path()).unwrap()).unwrap();
        assert_eq!(loaded.config(), source.config());
        assert_eq!(loaded.float_tensors(), source.float_tensors());
        assert_eq!(loaded.linears(), source.linears());
        let tokens: Vec<u32> = (0..30).map(|i| i * 11 % 64).collect();
        let (got, want) = (logits(&loaded, &tokens), logits(&source, &tokens));
        // Eight bits for weights and activations: errors near 2⁻⁸ per product, relative to the norm of the logits. Of a
        // mixture, some tokens that were undecided take another expert, which changes them at the order of its weight.
        let error: f32 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
        let norm: f32 = want.iter().map(|v| v * v).sum();
        let relative = (error / norm).sqrt();
        let limit = if source.config().moe.is_some() { 0.2 } else { 0.06 };
        assert!(relative < limit, "{name}: relative error {relative}");
    }
}

#[test]
fn experts_in_mxfp4_that_do_not_fit_are_refused_by_name() {
    let stored = golden("gpt_oss_mxfp4").join("model.safetensors");
    let tensors = nash_core::Safetensors::open(stored).unwrap();
    // What loading says if one tensor is missing, or has this type and shape.
    let load = |name: &str, change: Option<(DType, Vec<usize>)>| {
        let dir = tempfile::tempdir().unwrap();
        let config = golden("gpt_oss_mxfp4").join("config.json");
        std::fs::copy(config, dir.path().join("config.json")).unwrap();
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for tensor in tensors.tensors() {
            let (dtype, shape, bytes) = match (&change, tensor.name == name) {
                (None, true) => continue,
                (Some((dtype, shape)), true) => {
                    let size = dtype.block_bytes() * shape.iter().product::<usize>();
                    (*dtype, shape, vec![0; size])
                }
                _ => (tensor.dtype, &tensor.shape, tensor.data.to_vec()),
            };
            let start = data.len();
            data.extend(bytes);
            let entry = json!({"dtype": dtype.safetensors_name(), "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(tensor.name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.into_bytes());
        file.extend(data);
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        Model::load(&ModelFile::open(dir.path()).unwrap())
    };
    assert!(load("none of them", None).is_ok());
    let experts = "model.layers.1.mlp.experts";
    let (codes, scales) = (
        format!("{experts}.gate_up_proj_blocks"),
        format!("{experts}.gate_up_proj_scales"),
    );
    let refused = |name: &str, change, needles: &[&str]| {
        let error = load(name, change).unwrap_err().to_string();
        for needle in needles {
            assert!(error.contains(needle), "{needle:?} in {error:?}");
        }
    };
    refused(&scales, None, &["experts.0.gate_proj", &scales, "missing"]);
    refused(&codes, None, &["experts.0.gate_proj", &codes, "missing"]);
    refused(
        &scales,
        Some((DType::U8, vec![5, 64, 3])),
        &[&scales, "[5, 64, 3]", "[5, 64, 2]"],
    );
    refused(&scales, Some((DType::F16, vec![5, 64, 2])), &[&scales, "F16"]);
    refused(
        &codes,
        Some((DType::U8, vec![5, 63, 2, 16])),
        &[&codes, "[5, 63, 2, 16]"],
    );
    let bias = format!("{experts}.gate_up_proj_bias");
    refused(&bias, None, &["experts.0.gate_proj.bias", &bias]);
    refused(&bias, Some((DType::F16, vec![5, 32])), &[&bias, "[5, 64]"]);

    let mxfp4 = json!({"quant_method": "mxfp4"});
    let error = load_changed("llama", &[("quantization_config", mxfp4)]).unwrap_err();
    assert!(error.to_string().contains("mxfp4"), "{error}");
    let error = load_changed("gpt_oss", &[("swiglu_limit", json!(5.0))]).unwrap_err();
    assert!(error.to_string().contains("swiglu_limit 5"), "{error}");
}

/// A linear that does not say that it is packed, so that nothing is multiplied together with it.
struct Alone(Arc<dyn Linear>);

impl Linear for Alone {
    fn rows(&self) -> usize {
        self.0.rows()
    }

    fn cols(&self) -> usize {
        self.0.cols()
    }

    fn forward(&self, input: &Input<'_>, y: &mut [f32]) {
        self.0.forward(input, y);
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        self.0.row(row, out);
    }

    fn resident_bytes(&self) -> usize {
        self.0.resident_bytes()
    }
}

#[test]
fn experts_multiplied_together_answer_what_each_answers_alone() {
    for name in ["mixtral", "qwen2_moe", "dots1", "glm4_moe", "gpt_oss"] {
        let dir = tempfile::tempdir().unwrap();
        write_packed(&model(name), dir.path());
        let load = || Model::load(&ModelFile::open(dir.path()).unwrap()).unwrap();
        let (together, mut alone) = (load(), load());
        for info in together.linears() {
            let linear = Arc::clone(alone.linear(&info.name).unwrap());
            alone.set_linear(&info.name, Arc::new(Alone(linear))).unwrap();
        }
        let tokens: Vec<u32> = (0..45).map(|i| i * 11 % 64).collect();
        for chunk in [1, 2, 17, 45] {
            let run = |model: &Model| -> Vec<u32> {
                let mut cache = KvCache::new(model.config(), tokens.len());
                let hidden = tokens
                    .chunks(chunk)
                    .flat_map(|tokens| model.forward(tokens, &mut cache, &mut ()).unwrap());
                hidden.map(f32::to_bits).collect()
            };
            assert_eq!(run(&together), run(&alone), "{name} in chunks of {chunk}");
        }
    }
}

#[test]
fn a_packed_configuration_that_lies_is_refused() {
    let config = model("llama").config().clone();
    let mut json = json!({"nashswarm_model": config});
    assert_eq!(ModelConfig::from_packed(&json).unwrap(), config);
    json["nashswarm_model"]["attention"]["kv_heads"] = json!(3);
    assert!(ModelConfig::from_packed(&json).is_err());
    json["nashswarm_model"] = json!({"layers": 4});
    assert!(ModelConfig::from_packed(&json).is_err());
    assert!(
        ModelConfig::from_packed(&json!({}))
            .unwrap_err()
            .to_string()
            .contains("nashswarm_model")
    );
}

#[test]
fn a_vocabulary_in_parts_computes_what_a_whole_one_does() {
    for name in ["llama", "gpt2", "gemma3"] {
        let file = ModelFile::open(golden(name)).unwrap();
        let whole = Model::load(&file).unwrap();
        let vocab = whole.config().vocab_size;
        let ranged = Model::load_in_parts(&file, |config| VocabParts {
            ranges: vec![5, 8, config.vocab_size - 13],
            outliers: vec![1, 2, 17],
        })
        .unwrap();
        let ranges = |model: &Model| model.linears().iter().filter(|l| l.layer.is_none()).count();
        assert_eq!(ranges(&ranged), 6 * ranges(&whole));
        let tokens: Vec<u32> = [0, 4, 5, 12, 13, vocab - 1].map(|id| id as u32).into();
        let (a, b) = (logits(&whole, &tokens), logits(&ranged, &tokens));
        // The same sums over d products in another order of tiles: far below the size of a logit.
        assert!(
            a.iter()
                .zip(&b)
                .all(|(a, b)| (a - b).abs() <= 1e-4 * (1.0 + a.abs())),
            "{name}"
        );
        let last = (tokens.len() - 1) * vocab;
        let mut alone = vec![0.0; vocab];
        let mut cache = KvCache::new(ranged.config(), tokens.len());
        let hidden = ranged.forward(&tokens, &mut cache, &mut ()).unwrap();
        let d = ranged.config().hidden_size;
        ranged.logits(&hidden[hidden.len() - d..], &mut alone, &mut ());
        assert!(
            alone
                .iter()
                .zip(&a[last..])
                .all(|(a, b)| (a - b).abs() <= 1e-4 * (1.0 + a.abs())),
            "{name}"
        );
        let error = Model::load_in_parts(&file, |config| VocabParts {
            ranges: vec![5, config.vocab_size],
            outliers: Vec::new(),
        })
        .unwrap_err();
        assert!(error.to_string().contains("vocab_parts"), "{error}");
    }
}
