//! Stop strings on streamed text.

/// Holds back the end of a stream for as long as it may turn out to be the start of a stop string.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text not released yet: a proper prefix of some stop string, or empty.
    held: String,
}

/// What became of a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopMatch {
    /// No stop string so far; this text may be shown.
    Text(String),
    /// A stop string came; this text stood before it, and nothing more is to be shown.
    Stopped(String),
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are ignored.
    #[must_use]
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece of the stream.
    pub fn push(&mut self, text: &str) -> StopMatch {
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(at) = first {
            self.held.truncate(at);
            return StopMatch::Stopped(std::mem::take(&mut self.held));
        }
        let keep_from = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep_from);
        StopMatch::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The text still held back, at the end of the stream.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|s| (*s).to_owned()))
    }

    #[test]
    fn partial_matches_are_held_back() {
        let mut m = matcher(&["</s>", "END"]);
        assert_eq!(m.push("hello <"), StopMatch::Text("hello ".into()));
        assert_eq!(m.push("/"), StopMatch::Text(String::new()));
        assert_eq!(m.push("p> E"), StopMatch::Text("</p> ".into()));
        assert_eq!(m.push("N"), StopMatch::Text(String::new()));
        assert_eq!(m.push("D of"), StopMatch::Stopped(String::new()));
        assert_eq!(matcher(&["x"]).push("ab"), StopMatch::Text("ab".into()));
        let mut m = matcher(&["stop"]);
        assert_eq!(m.push("at sto"), StopMatch::Text("at ".into()));
        assert_eq!(m.flush(), "sto");
    }

    proptest! {
        /// However the text is cut, the text shown is the text before the first stop string.
        #[test]
        fn cutting_does_not_matter(text in "[abé]{0,24}", cuts in prop::collection::vec(0usize..4, 0..24)) {
            let stops = ["aba", "bé"];
            let end = stops.iter().filter_map(|s| text.find(s)).min();
            let mut m = matcher(&stops);
            let mut shown = String::new();
            let mut stopped = false;
            let mut rest: Vec<char> = text.chars().collect();
            for take in cuts.into_iter().chain(std::iter::once(usize::MAX)) {
                let piece: String = rest.drain(..take.min(rest.len())).collect();
                match m.push(&piece) {
                    StopMatch::Text(t) => shown.push_str(&t),
                    StopMatch::Stopped(t) => { shown.push_str(&t); stopped = true; break; }
                }
            }
            if !stopped { shown.push_str(&m.flush()); }
            prop_assert_eq!(stopped, end.is_some());
            // Neither of these stops lies inside the other, so the one that starts first is complete first.
            prop_assert_eq!(shown, &text[..end.unwrap_or(text.len())]);
        }
    }
}
