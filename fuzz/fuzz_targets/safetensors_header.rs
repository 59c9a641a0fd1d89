//! Any bytes as a safetensors file: an error or a list of tensors inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = antefix_models::safetensors::check_header(bytes);
});
