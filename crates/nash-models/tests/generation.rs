//! Generation: greedy against the definition, chunked prompts, reuse of the cache, every way to end.

#![expect(clippy::unwrap_used, reason = "a test says by panicking that it failed")]

use std::path::Path;

use nash_core::ModelFile;
use nash_models::{
    FinishReason, GenerateOptions, Generator, KvCache, Model, ModelError, PREFILL_CHUNK, Sampler,
    SamplingParams, argmax,
};

fn model(name: &str) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    Model::load(&ModelFile::open(folder).unwrap()).unwrap()
}

fn greedy() -> Sampler {
    Sampler::new(SamplingParams::default()).unwrap()
}

fn options(max: usize) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: Some(max),
        ..Default::default()
    }
}

fn collect(generator: Generator<'_>) -> Vec<u32> {
    generator.map(Result::unwrap).collect()
}

const PROMPT: [u32; 5] = [1, 17, 30, 8, 55];

#[test]
fn a_model_that_streams_its_weights_says_the_same() {
    for name in ["llama", "gemma3", "gpt2", "mixtral", "gpt_oss"] {
        let mut model = model(name);
        let states = |model: &Model| {
            let mut cache = KvCache::new(model.config(), PROMPT.len());
            model.forward(&PROMPT, &mut cache, &mut ()).unwrap()
        };
        let kept = states(&model);
        model.set_streaming(true);
        assert_eq!(states(&model), kept, "{name}");
        // What the first pass has released is there again.
        assert_eq!(states(&model), kept, "{name}, again");
    }
}

#[test]
fn greedy_takes_the_best_token_of_the_whole_context_every_time() {
    for name in ["llama", "gemma3", "gpt2", "mixtral"] {
        let model = model(name);
        let mut cache = KvCache::new(model.config(), 40);
        let got = collect(Generator::new(&model, &mut cache, greedy(), &PROMPT, options(12)).unwrap());
        assert_eq!(got.len(), 12);
        let mut tokens = PROMPT.to_vec();
        for token in got {
            let mut fresh = KvCache::new(model.config(), 40);
            let hidden = model.forward(&tokens, &mut fresh, &mut ()).unwrap();
            let mut logits = vec![0.0; model.config().vocab_size];
            model.logits(
                &hidden[hidden.len() - model.config().hidden_size..],
                &mut logits,
                &mut (),
            );
            // The f16 cache may tip a near tie, nothing else.
            let best = logits[argmax(&logits) as usize];
            assert!(
                best - logits[token as usize] < 0.02,
                "{name}: {token} is not the best"
            );
            tokens.push(token);
        }
    }
}

#[test]
fn every_way_to_end() {
    let model = model("llama");
    let mut cache = KvCache::new(model.config(), 12);
    let mut generator = Generator::new(&model, &mut cache, greedy(), &PROMPT, options(3)).unwrap();
    let first: Vec<u32> = generator.by_ref().map(Result::unwrap).collect();
    assert_eq!(generator.finish_reason(), Some(FinishReason::MaxTokens));
    assert_eq!(generator.tokens(), [&PROMPT[..], &first].concat());
    assert!(generator.next().is_none(), "it stays ended");

    let end = first[2];
    let stop = GenerateOptions {
        end_of_generation: [end].into(),
        ..options(100)
    };
    let mut generator = Generator::new(&model, &mut cache, greedy(), &PROMPT, stop).unwrap();
    let until: Vec<u32> = generator.by_ref().map(Result::unwrap).collect();
    let at = first.iter().position(|token| *token == end).unwrap();
    assert_eq!(until, first[..at], "the end token itself is not given out");
    assert_eq!(
        generator.finish_reason(),
        Some(FinishReason::EndOfGeneration(end))
    );

    // Twelve positions hold the prompt and seven tokens; the eighth is given out but cannot be run.
    let mut generator = Generator::new(&model, &mut cache, greedy(), &PROMPT, options(100)).unwrap();
    assert_eq!(generator.by_ref().map(Result::unwrap).count(), 8);
    assert_eq!(generator.finish_reason(), Some(FinishReason::ContextFull));

    let mut generator = Generator::new(&model, &mut cache, greedy(), &PROMPT, options(0)).unwrap();
    assert!(generator.next().is_none());
    assert_eq!(generator.finish_reason(), Some(FinishReason::MaxTokens));
}

#[test]
fn bad_prompts_are_errors() {
    let model = model("llama");
    let mut cache = KvCache::new(model.config(), 4);
    let mut start = |prompt: &[u32]| {
        Generator::new(&model, &mut cache, greedy(), prompt, options(1))
            .map(|_| ())
            .unwrap_err()
    };
    assert!(matches!(start(&[]), ModelError::EmptyPrompt));
    assert!(matches!(
        start(&[1; 5]),
        ModelError::ContextOverflow {
            needed: 5,
            capacity: 4
        }
    ));
    assert!(matches!(start(&[99]), ModelError::TokenOutOfRange { .. }));
}

#[test]
fn long_prompts_run_in_chunks_and_tell_their_progress() {
    let model = model("mistral_window");
    let prompt: Vec<u32> = (0..PREFILL_CHUNK as u32 * 2 + 100).map(|i| i * 13 % 64).collect();
    let mut cache = KvCache::new(model.config(), prompt.len() + 10);
    let mut steps = Vec::new();
    let mut progress = |done, total| steps.push((done, total));
    let generator =
        Generator::with_progress(&model, &mut cache, greedy(), &prompt, (options(5), &mut progress)).unwrap();
    let chunked = collect(generator);
    let n = prompt.len();
    assert_eq!(steps, [(512, n), (1024, n), (n, n)]);

    // The whole prompt at once ends in nearly the same logits.
    let mut whole = KvCache::new(model.config(), n + 10);
    let hidden = model.forward(&prompt, &mut whole, &mut ()).unwrap();
    let mut logits = vec![0.0; model.config().vocab_size];
    model.logits(
        &hidden[hidden.len() - model.config().hidden_size..],
        &mut logits,
        &mut (),
    );
    assert!(logits[argmax(&logits) as usize] - logits[chunked[0] as usize] < 0.02);
}

#[test]
fn a_second_turn_computes_only_what_is_new() {
    let model = model("qwen3");
    let mut cache = KvCache::new(model.config(), 64);
    let answer = collect(Generator::new(&model, &mut cache, greedy(), &PROMPT, options(6)).unwrap());
    let second = [&PROMPT[..], &answer, &[9, 22, 4]].concat();
    let mut done = Vec::new();
    let mut progress = |now, _| done.push(now);
    let generator =
        Generator::with_progress(&model, &mut cache, greedy(), &second, (options(4), &mut progress)).unwrap();
    let reused = collect(generator);
    assert_eq!(done, [second.len()]);
    assert_eq!(&cache.tokens()[..second.len()], second);
    // A prompt that departs earlier forgets what does not fit, and gives what an empty cache gives.
    let other = [1, 17, 30, 41];
    let again = collect(Generator::new(&model, &mut cache, greedy(), &other, options(4)).unwrap());
    let mut fresh = KvCache::new(model.config(), 64);
    let want = collect(Generator::new(&model, &mut fresh, greedy(), &other, options(4)).unwrap());
    assert_eq!(again, want);
    assert_eq!(reused.len(), 4);
}

#[test]
fn a_seed_gives_the_same_text_and_another_seed_another() {
    let model = model("llama");
    let run = |seed| {
        let params = SamplingParams {
            temperature: 1.2,
            top_p: 0.95,
            seed,
            ..Default::default()
        };
        let mut cache = KvCache::new(model.config(), 64);
        let sampler = Sampler::new(params).unwrap();
        collect(Generator::new(&model, &mut cache, sampler, &PROMPT, options(40)).unwrap())
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}
