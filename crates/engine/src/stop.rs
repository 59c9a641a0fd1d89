//! Stop strings on streamed text: nothing that might become a stop string is let out early.

/// Holds back text that could still turn into one of the stop strings.
#[derive(Debug, Clone, Default)]
pub(crate) struct StopMatcher {
    /// With their places in the request.
    stops: Vec<(usize, String)>,
    held: String,
}

/// What to do with the text so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// Safe to show; may be empty.
    Go(String),
    /// The stop string of this place in the request came: show the text and end. The stop string itself is not shown.
    Stop(String, usize),
}

impl StopMatcher {
    /// Empty strings are ignored.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops
                .into_iter()
                .enumerate()
                .filter(|s| !s.1.is_empty())
                .collect(),
            held: String::new(),
        }
    }

    /// Takes the next piece of text in.
    pub(crate) fn push(&mut self, piece: &str) -> Stopped {
        self.held.push_str(piece);
        let found = |(i, stop): &(usize, String)| self.held.find(stop.as_str()).map(|at| (at, *i));
        if let Some((at, which)) = self.stops.iter().filter_map(found).min() {
            self.held.truncate(at);
            return Stopped::Stop(std::mem::take(&mut self.held), which);
        }
        let keep = self
            .stops
            .iter()
            .map(|(_, s)| overlap(&self.held, s))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Stopped::Go(std::mem::replace(&mut self.held, rest))
    }

    /// The end came without a stop string: what was held back.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest proper prefix of `stop` that ends `text`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .filter(|&at| at > 0 && text.ends_with(&stop[..at]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown, and which stop string ended it.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut m = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut shown = String::new();
        for p in pieces {
            match m.push(p) {
                Stopped::Go(s) => shown += &s,
                Stopped::Stop(s, which) => return (shown + &s, Some(which)),
            }
        }
        (shown + &m.finish(), None)
    }

    #[test]
    fn a_stop_string_split_over_pieces_is_found() {
        assert_eq!(run(&["<end>"], &["ab<", "en", "d>cd"]), ("ab".into(), Some(0)));
    }

    #[test]
    fn a_false_start_is_let_out() {
        assert_eq!(run(&["<end>"], &["ab<en", "ough"]), ("ab<enough".into(), None));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b!"]), ("a".into(), Some(0)));
    }

    #[test]
    fn the_earliest_of_several_wins_and_characters_stay_whole() {
        assert_eq!(run(&["é!", "", "ß"], &["né", "ß!"]), ("né".into(), Some(2)));
        assert_eq!(run(&[""], &["x"]), ("x".into(), None));
    }
}
