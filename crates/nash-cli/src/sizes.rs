//! Honest sizes: every byte of a model file, by tensor.

use nash_core::{ModelFile, PackedFolder};
use nash_eval::report::SizeReport;

/// A tensor of a model file.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct TensorSize {
    /// Name in the file.
    pub(crate) name: String,
    /// Element type, or `3-bit` for a packed tensor.
    pub(crate) kind: String,
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    /// Stored bytes; of a packed tensor with scales and codebook.
    pub(crate) bytes: u64,
}

impl TensorSize {
    /// Number of weights.
    pub(crate) fn weights(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Stored bits per weight.
    pub(crate) fn bits(&self) -> f64 {
        8.0 * self.bytes as f64 / self.weights().max(1) as f64
    }

    /// Whether it is a weight matrix: not a norm, a bias, a table of positions or a router, which stay in floats.
    pub(crate) fn is_linear(&self) -> bool {
        let is_float = [
            "position",
            "pos_embd",
            "wpe",
            "router",
            "ffn_gate_inp",
            "mlp.gate.",
            "block_sparse_moe.gate.",
        ]
        .iter()
        .any(|part| self.name.contains(part));
        !is_float && self.shape.iter().filter(|&&n| n > 1).count() >= 2
    }
}

/// All tensors of a file, in its order.
pub(crate) fn tensors(file: &ModelFile) -> anyhow::Result<Vec<TensorSize>> {
    let mut out = Vec::new();
    for name in file.names() {
        let tensor = file.tensor(name)?;
        out.push(TensorSize {
            name: tensor.name,
            kind: tensor.dtype.name().to_owned(),
            shape: tensor.shape,
            bytes: tensor.data.len() as u64,
        });
    }
    if let ModelFile::Packed(folder) = file {
        out.extend(packed(folder));
    }
    Ok(out)
}

fn packed(folder: &PackedFolder) -> impl Iterator<Item = TensorSize> {
    folder.packed_tensors().iter().map(|(name, tensor)| {
        let shape = tensor.shape();
        TensorSize {
            name: name.clone(),
            kind: format!("{}-bit", shape.width.bits()),
            shape: vec![shape.rows, shape.cols],
            bytes: tensor.bytes() as u64,
        }
    })
}

/// Bytes of the model, tokenizer texts not counted. Of a packed folder configuration and report count.
pub(crate) fn file_bytes(file: &ModelFile) -> u64 {
    let texts = match file {
        ModelFile::Packed(folder) => ["config.json", "nashswarm.json"]
            .iter()
            .filter_map(|name| std::fs::metadata(folder.file(name)?).ok())
            .map(|data| data.len())
            .sum(),
        _ => 0,
    };
    file.file_bytes() + texts
}

/// Sizes of a whole file.
pub(crate) fn size_report(file: &ModelFile) -> anyhow::Result<SizeReport> {
    Ok(summary(&tensors(file)?, file_bytes(file)))
}

/// Sizes from the tensors and the bytes of the file.
pub(crate) fn summary(tensors: &[TensorSize], file_bytes: u64) -> SizeReport {
    let weights: u64 = tensors.iter().map(TensorSize::weights).sum();
    let (bytes, linear_weights) = tensors
        .iter()
        .filter(|tensor| tensor.is_linear())
        .fold((0, 0), |(bytes, weights), tensor| {
            (bytes + tensor.bytes, weights + tensor.weights())
        });
    let bits = |bytes: u64, weights: u64| 8.0 * bytes as f64 / weights.max(1) as f64;
    SizeReport {
        file_bytes,
        file_bits_per_weight: bits(file_bytes, weights),
        linear_bits_per_weight: bits(bytes, linear_weights),
        weights,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], bytes: u64) -> TensorSize {
        TensorSize {
            name: name.into(),
            kind: "F16".into(),
            shape: shape.into(),
            bytes,
        }
    }

    #[test]
    fn linears_are_the_matrices() {
        let tensors = [
            tensor("model.embed_tokens.weight", &[100, 8], 1600),
            tensor("model.layers.0.self_attn.q_proj", &[8, 8], 32),
            tensor("blk.1.ffn_up_exps.weight", &[4, 8, 8], 256),
            tensor("model.layers.0.input_layernorm.weight", &[8], 16),
            tensor("model.layers.0.self_attn.q_proj.bias", &[1, 8], 16),
            tensor("wpe.weight", &[4, 8], 64),
        ];
        let sizes = summary(&tensors, 2000);
        assert_eq!(sizes.weights, 800 + 64 + 256 + 8 + 8 + 32);
        assert_eq!(sizes.linear_bits_per_weight, 8.0 * 1888.0 / 1120.0);
        assert_eq!(sizes.file_bits_per_weight, 8.0 * 2000.0 / 1168.0);
    }
}
