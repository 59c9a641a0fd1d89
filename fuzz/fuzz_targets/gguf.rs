//! Any bytes as a GGUF file: an error or a model, all of whose parts can be read.
#![no_main]

use antefix_models::{
    files::{ModelFiles, Role},
    gguf::{Array, Gguf, Value},
};
use libfuzzer_sys::fuzz_target;

fn walk(array: Array<'_>) -> usize {
    let count = array
        .iter()
        .map(|value| match value {
            Value::Array(inner) => walk(inner),
            Value::Str(text) => text.len(),
            _ => 1,
        })
        .count();
    assert_eq!(count, array.len(), "every item that was counted can be read");
    count
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    for key in gguf.keys() {
        let value = gguf.get(key).expect("a listed key has a value");
        if let Value::Array(array) = value {
            walk(array);
        }
    }
    for tensor in gguf.tensors() {
        let again = gguf.tensor(tensor.name).expect("a listed tensor is found");
        assert_eq!(again.bytes, tensor.bytes);
    }
    let Ok(files) = ModelFiles::from_gguf(gguf, "fuzz.gguf".as_ref()) else { return };
    let spec = files.spec();
    assert!(spec.ropes.iter().all(|rope| rope.frequencies().iter().all(|f| f.is_finite())));
    for role in Role::all(spec.layers) {
        let tensor = files.tensor(role).expect("checked on opening");
        assert_eq!(tensor.is_some(), role.shape(spec).is_some());
    }
    files.fingerprint();
});
