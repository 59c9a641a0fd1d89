//! A claim of the paper as a test: the smallest setting in which it can be seen, with the paper's number beside ours.

#[test]
#[ignore = "write a claim of the paper as an assertion, then delete this line"]
fn the_claim_of_the_paper_holds() {
    panic!("no claim of the paper is reproduced yet");
}
