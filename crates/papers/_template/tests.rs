//! {{slug}} against its reference, and at its limits.

use super::reference::attention;

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&super::{{Type}});
}

#[test]
fn equal_scores_give_the_mean_of_the_values() {
    let out = attention(&[0.0, 0.0], &[1.0, 2.0, -3.0, 4.0], &[1.0, 10.0, 3.0, 30.0], 2);
    assert!(
        (out[0] - 2.0).abs() < 1e-6 && (out[1] - 20.0).abs() < 1e-5,
        "{out:?}"
    );
}

#[test]
fn no_keys_give_zero() {
    assert_eq!(attention(&[1.0, 2.0], &[], &[], 2), [0.0, 0.0]);
}
