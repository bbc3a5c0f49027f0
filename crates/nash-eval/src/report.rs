//! The results of measurements as they are written with `--json`. Field names are stable: scripts rely on them.
//!
//! Divergences are in nats, sizes in bytes, times in seconds, rates per second, shares between 0 and 1.

use serde::{Deserialize, Serialize};

use crate::routing::ExpertUse;

/// Perplexity over the windows of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerplexityReport {
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Its standard error, `perplexity` times the standard error of the mean.
    pub perplexity_stderr: f64,
    /// Tokens in a window.
    pub ctx: usize,
    /// Windows evaluated.
    pub chunks: usize,
    /// Predictions scored.
    pub scored_tokens: u64,
}

/// A model against its reference over the windows of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComparisonReport {
    /// Perplexity of the model.
    #[serde(flatten)]
    pub perplexity: PerplexityReport,
    /// Perplexity of the reference over the same predictions.
    pub reference_perplexity: f64,
    /// Its standard error.
    pub reference_perplexity_stderr: f64,
    /// `ln(perplexity / reference_perplexity)`.
    pub log_perplexity_ratio: f64,
    /// Its standard error, counting that both models err on the same tokens.
    pub log_perplexity_ratio_stderr: f64,
    /// Mean divergence `KL(reference ‖ model)` of a prediction.
    pub kl_mean: f64,
    /// Standard error of the mean.
    pub kl_mean_stderr: f64,
    /// Median divergence.
    pub kl_median: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// Largest divergence.
    pub kl_max: f64,
    /// Share of predictions whose most likely token is the reference's.
    pub top1_agreement: f64,
    /// Its standard error.
    pub top1_agreement_stderr: f64,
}

impl ComparisonReport {
    /// The perplexity of the reference, as a report of its own.
    pub fn reference(&self) -> PerplexityReport {
        PerplexityReport {
            perplexity: self.reference_perplexity,
            perplexity_stderr: self.reference_perplexity_stderr,
            ..self.perplexity.clone()
        }
    }
}

/// Honest sizes of a model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SizeReport {
    /// Bytes of the model: weights, scales, codebooks, headers; tokenizer texts not counted.
    pub file_bytes: u64,
    /// `8 · file_bytes` over the number of weights, embeddings, norms and biases included.
    pub file_bits_per_weight: f64,
    /// Bits per weight of the linear layers alone, with their scales and codebooks.
    pub linear_bits_per_weight: f64,
    /// Number of weights.
    pub weights: u64,
}

/// Tokens per second, medians over the repeats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeedReport {
    /// Prompt tokens per second, all in one pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_second: Option<f64>,
    /// Generated tokens per second, one by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_second: Option<f64>,
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Tokens of context before the prompt and before the first generated token.
    pub depth: usize,
    /// Seconds of the very first token, from weights that may still be on the disk; loading not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_seconds: Option<f64>,
    /// Threads of the run.
    pub threads: usize,
    /// Every prefill rate, in the order measured.
    pub prefill_samples: Vec<f64>,
    /// Every decode rate, in the order measured.
    pub decode_samples: Vec<f64>,
    /// Weight bytes that one generated token reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_token: Option<u64>,
    /// Bytes per second of plain reads, the median of passes between the repeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<f64>,
    /// Weight bytes read per second of decode as a share of that; keys and values are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_share: Option<f64>,
}

/// Answers of a model to the questions of a task. Intervals are 95 % percentile-bootstrap intervals over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Name of the task.
    pub task: String,
    /// Where its questions are from: a folder, or a data set and its commit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Examples shown before each question.
    pub shots: usize,
    /// Questions answered.
    pub examples: usize,
    /// Seed of examples, questions and resamples.
    pub seed: u64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Lower end of its interval.
    pub accuracy_low: f64,
    /// Upper end of its interval.
    pub accuracy_high: f64,
    /// F1 of label 1; tasks with two answers only, as the Matthews correlation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
    /// Lower end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1_low: Option<f64>,
    /// Upper end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1_high: Option<f64>,
    /// Matthews correlation of answers and labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matthews: Option<f64>,
    /// Lower end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matthews_low: Option<f64>,
    /// Upper end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matthews_high: Option<f64>,
    /// Share of answers that are the reference's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// Lower end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement_low: Option<f64>,
    /// Upper end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement_high: Option<f64>,
    /// Accuracy less the reference's, on the same questions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_change: Option<f64>,
    /// Lower end of its interval, which is paired: both answer the same resampled questions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_change_low: Option<f64>,
    /// Upper end of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_change_high: Option<f64>,
}

/// One model, method or size of a report; absent measurements are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Sizes.
    #[serde(flatten)]
    pub size: Option<SizeReport>,
    /// Divergence from the reference, with perplexity.
    #[serde(flatten)]
    pub comparison: Option<ComparisonReport>,
    /// Perplexity of a model that was compared with nothing.
    #[serde(flatten)]
    pub perplexity: Option<PerplexityReport>,
    /// Answers to the questions of a task.
    #[serde(flatten)]
    pub answers: Option<TaskReport>,
    /// Speed.
    #[serde(flatten)]
    pub speed: Option<SpeedReport>,
    /// What the tokens of a mixture of experts touched, if a routing rule was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_use: Option<ExpertUse>,
    /// Seconds to compress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress_seconds: Option<f64>,
    /// Largest gain that a player of the compression games could still make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_regret: Option<f64>,
    /// Seconds to open the file and build the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_seconds: Option<f64>,
    /// From the start of the program to the logits of a first token, with the tokenizer read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_answer_seconds: Option<f64>,
    /// Largest resident size of the process so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// Resident size of the process after the measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident_memory_bytes: Option<u64>,
}

/// A whole report: one entry per model under `rows`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The entries.
    pub rows: Vec<Row>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_flat_and_absent_parts_are_absent() {
        let perplexity = PerplexityReport {
            perplexity: 9.5,
            perplexity_stderr: 0.25,
            ctx: 512,
            chunks: 4,
            scored_tokens: 1020,
        };
        let row = Row {
            name: "m".into(),
            perplexity: Some(perplexity),
            load_seconds: Some(0.5),
            ..Row::default()
        };
        let json = serde_json::to_value(&row).unwrap();
        let expected = serde_json::json!({
            "name": "m", "perplexity": 9.5, "perplexity_stderr": 0.25, "ctx": 512, "chunks": 4,
            "scored_tokens": 1020, "load_seconds": 0.5
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn the_names_scripts_rely_on() {
        let perplexity = PerplexityReport {
            perplexity: 1.0,
            perplexity_stderr: 1.0,
            ctx: 1,
            chunks: 1,
            scored_tokens: 1,
        };
        let comparison = ComparisonReport {
            perplexity,
            reference_perplexity: 1.0,
            reference_perplexity_stderr: 1.0,
            log_perplexity_ratio: 1.0,
            log_perplexity_ratio_stderr: 1.0,
            kl_mean: 1.0,
            kl_mean_stderr: 1.0,
            kl_median: 1.0,
            kl_p99: 1.0,
            kl_max: 1.0,
            top1_agreement: 1.0,
            top1_agreement_stderr: 1.0,
        };
        let speed = SpeedReport {
            prefill_tokens_per_second: Some(1.0),
            decode_tokens_per_second: Some(1.0),
            prompt_tokens: 1,
            generated_tokens: 1,
            depth: 0,
            first_token_seconds: Some(1.0),
            threads: 1,
            prefill_samples: vec![1.0],
            decode_samples: vec![1.0],
            bytes_per_token: Some(1),
            bandwidth: Some(1.0),
            bandwidth_share: Some(1.0),
        };
        let size = SizeReport {
            file_bytes: 1,
            file_bits_per_weight: 1.0,
            linear_bits_per_weight: 1.0,
            weights: 1,
        };
        let row = Row {
            name: "m".into(),
            size: Some(size),
            comparison: Some(comparison),
            speed: Some(speed),
            compress_seconds: Some(1.0),
            max_regret: Some(0.0),
            peak_memory_bytes: Some(1),
            ..Row::default()
        };
        let json = serde_json::to_value(Report { rows: vec![row] }).unwrap();
        for name in [
            "file_bytes",
            "file_bits_per_weight",
            "linear_bits_per_weight",
            "perplexity",
            "perplexity_stderr",
            "kl_mean",
            "kl_median",
            "kl_p99",
            "top1_agreement",
            "decode_tokens_per_second",
            "prefill_tokens_per_second",
            "bandwidth_share",
            "compress_seconds",
            "peak_memory_bytes",
            "max_regret",
        ] {
            assert!(json["rows"][0].get(name).is_some(), "{name}");
        }
    }
}
