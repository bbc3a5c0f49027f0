//! A tap that has seen enough ends a layer, and sees until then what one that looks at everything sees.

use std::path::Path;

use nash_core::ModelFile;
use nash_models::{KvCache, Model, Site, Tap};

/// Keeps what goes into all sites, up to the last one of interest.
struct Until {
    last: Option<Site>,
    seen: Vec<(Site, Vec<f32>)>,
}

impl Tap for Until {
    fn input(&mut self, _: usize, site: Site, x: &[f32], _: usize, _: usize) {
        self.seen.push((site, x.to_vec()));
    }

    fn wants_more(&self) -> bool {
        self.last.is_none() || self.seen.last().map(|s| s.0) != self.last
    }
}

#[test]
fn a_tap_that_has_seen_enough_ends_a_layer() {
    for name in ["llama", "gemma3", "gpt2"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        let model = Model::load(&ModelFile::open(&folder).unwrap()).unwrap();
        let tokens: Vec<u32> = (0..12).map(|i| i * 5 % 64).collect();
        let run = |last| {
            let (mut x, mut tap) = (
                Vec::new(),
                Until {
                    last,
                    seen: Vec::new(),
                },
            );
            model.embed(&tokens, 0, &mut x).unwrap();
            let mut cache = KvCache::new(model.config(), tokens.len());
            model.layer_forward(0, &mut x, &mut cache, 0, &mut tap).unwrap();
            tap.seen
        };
        let all = run(None);
        let sites = [Site::AttnIn, Site::AttnOut, Site::MlpIn, Site::MlpDown];
        assert_eq!(all.iter().map(|s| s.0).collect::<Vec<_>>(), sites, "{name}");
        for (count, site) in sites.into_iter().enumerate() {
            assert_eq!(run(Some(site)), all[..=count], "{name}, {site:?}");
        }
    }
}
