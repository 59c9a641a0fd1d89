//! jrt: where the copies stand.

use super::*;

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&Jrt);
}

struct Breaks;

impl Words for Breaks {
    fn encode(&self, text: &str) -> Vec<u32> {
        text.bytes().map(|b| 1000 + u32::from(b)).collect()
    }
}

fn rewritten(times: usize, question_first: bool) -> Prompt {
    let prompt = Prompt {
        tokens: (0..10).collect(),
        documents: vec![2..4, 5..7],
    };
    let twice = Twice {
        times,
        question_first,
    };
    twice.rewrite(prompt, &Breaks)
}

#[test]
fn the_documents_and_what_stands_between_them_come_again() {
    let prompt = rewritten(2, false);
    assert_eq!(prompt.tokens, [0, 1, 2, 3, 4, 5, 6, 1010, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(prompt.documents, [2..4, 5..7, 8..10, 11..13]);
    assert!(prompt.is_sound());
}

#[test]
fn the_question_stands_in_front_on_request() {
    let prompt = rewritten(1, true);
    assert_eq!(prompt.tokens, [0, 1, 7, 8, 9, 1010, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(prompt.documents, [6..8, 9..11]);
}

#[test]
fn once_and_the_question_last_changes_nothing() {
    let prompt = rewritten(1, false);
    assert_eq!(prompt.tokens, (0..10).collect::<Vec<_>>());
    assert_eq!(prompt.documents, [2..4, 5..7]);
}

#[test]
fn without_documents_nothing_is_repeated() {
    let twice = Twice {
        times: 3,
        question_first: true,
    };
    assert_eq!(
        twice.rewrite(Prompt::plain(vec![1, 2]), &Breaks),
        Prompt::plain(vec![1, 2])
    );
}
