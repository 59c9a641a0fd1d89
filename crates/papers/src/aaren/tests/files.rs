//! Hostile files: an error with a name, never a panic.

use safetensors::Dtype;

use super::streams::{config, event, model, tasks, tensors};
use crate::aaren::config::{Config, Mixer, Norm};
use crate::aaren::file::{FORMAT, FileError, pack, read, write};
use crate::aaren::model::Model;
use crate::aaren::stream::Session;

fn sound() -> (Config, Vec<u8>) {
    let config = config(Mixer::Aaren, Norm::Pre, tasks()[2].clone());
    let bytes = write(&config, &tensors(&config, 1)).unwrap();
    (config, bytes)
}

#[test]
fn what_is_written_is_read() {
    for mixer in [Mixer::Aaren, Mixer::Attention] {
        for norm in [Norm::Pre, Norm::Post] {
            for task in tasks() {
                let config = config(mixer, norm, task);
                let weights = tensors(&config, 7);
                let (again, values) = read(&write(&config, &weights).unwrap()).unwrap();
                assert_eq!((again, values), (config, weights));
            }
        }
    }
}

#[test]
fn files_cut_short_or_with_any_byte_of_the_header_changed_are_refused_or_read_never_a_panic() {
    let (_, bytes) = sound();
    for cut in (0..bytes.len()).step_by(97).chain(0..64) {
        assert!(
            matches!(Model::read(&bytes[..cut]), Err(FileError::Broken(_))),
            "{cut}"
        );
    }
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    let mut refused = 0;
    for at in 0..header {
        for value in [0, b'"', b'9', 0xff] {
            let mut broken = bytes.clone();
            broken[at] = value;
            refused += usize::from(Model::read(&broken).is_err());
        }
    }
    assert!(refused > 2 * header, "{refused} of {}", 4 * header);
}

#[test]
fn configurations_that_make_no_model_are_refused_by_field() {
    let (config, _) = sound();
    let weights = tensors(&config, 1);
    let refused = |change: &dyn Fn(&mut Config), want: &str| {
        let mut wrong = config.clone();
        change(&mut wrong);
        let error = write(&wrong, &weights).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        // As a reader sees it: the text of a config and no tensors that matter.
        let text = serde_json::to_string(&wrong).unwrap();
        let file = pack(&[], &[("format", FORMAT.into()), ("config", text)]).unwrap();
        let error = read(&file).unwrap_err().to_string();
        assert!(
            error.contains(want) || error.contains("cannot be read"),
            "{error}"
        );
    };
    refused(&|c| c.heads = 0, "`heads` is 0, but must be 1 to 12");
    refused(
        &|c| c.heads = 5,
        "`width` is 12, but must be even, and a multiple of",
    );
    refused(&|c| c.width = usize::MAX, "`width` is 18446744073709551615");
    refused(&|c| c.layers = 1 << 40, "`layers` is");
    refused(&|c| c.ffn = 0, "`ffn` is 0");
    refused(&|c| c.decay = -1.0, "`decay` is -1");
    refused(&|c| c.decay = f64::NAN, "`decay` is NaN");
    refused(
        &|c| {
            c.mixer = Mixer::Attention;
            c.decay = 0.5;
        },
        "`decay` is 0.5, but must be 0 with the mixer `attention`",
    );
    for (task, want) in [
        (
            "{\"kind\":\"events\",\"marks\":0,\"components\":0,\"log_mean\":0,\"log_std\":1}",
            "components",
        ),
        (
            "{\"kind\":\"events\",\"marks\":0,\"components\":1,\"log_mean\":0,\"log_std\":0}",
            "log_std",
        ),
        (
            "{\"kind\":\"classify\",\"channels\":2,\"classes\":[\"a\"],\"scale\":{\"mean\":[0],\"std\":[1,1]}}",
            "`scale.mean` is a list of 1, but must be a list of 2",
        ),
        (
            "{\"kind\":\"classify\",\"channels\":1,\"classes\":[\"a\"],\"scale\":{\"mean\":[0],\"std\":[0]}}",
            "`scale.std` is 0",
        ),
        ("{\"kind\":\"dance\"}", "unknown variant `dance`"),
        (
            "{\"kind\":\"forecast\",\"channels\":1,\"horizon\":1,\"scale\":{\"mean\":[0],\"std\":[1]},\"more\":1}",
            "more",
        ),
    ] {
        let text = format!(
            "{{\"mixer\":\"aaren\",\"width\":4,\"heads\":2,\"layers\":1,\"ffn\":4,\"norm\":\"pre\",\"decay\":0,\"task\":{task}}}"
        );
        let file = pack(&[], &[("format", FORMAT.into()), ("config", text)]).unwrap();
        let error = read(&file).unwrap_err().to_string();
        assert!(error.contains(want), "{task}: {error}");
    }
}

#[test]
fn tensors_that_are_missing_more_of_another_type_or_no_numbers_are_named() {
    let (config, _) = sound();
    let text = serde_json::to_string(&config).unwrap();
    let weights = tensors(&config, 1);
    let file = |change: &dyn Fn(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>)| {
        let mut parts: Vec<_> = config
            .tensors()
            .into_iter()
            .map(|(name, shape)| {
                let bytes = weights[&name].iter().flat_map(|x| x.to_le_bytes()).collect();
                (name, Dtype::F32, shape, bytes)
            })
            .collect();
        change(&mut parts);
        let file = pack(&parts, &[("format", FORMAT.into()), ("config", text.clone())]).unwrap();
        read(&file).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(file(&|_| ()), Ok(()));
    let error = file(&|p| drop(p.remove(3))).unwrap_err();
    assert!(error.ends_with("is missing"), "{error}");
    let error = file(&|p| p.push(("extra".into(), Dtype::F32, vec![1], vec![0; 4]))).unwrap_err();
    assert_eq!(error, "tensor `extra` is none of this model's");
    let error = file(&|p| p[0].1 = Dtype::I32).unwrap_err();
    assert!(error.contains("is I32, but must be F32"), "{error}");
    let error = file(&|p| p[0].2.reverse()).unwrap_err();
    assert!(error.contains("is [2, 12], but must be [12, 2]"), "{error}");
    let error = file(&|p| p[0].3[..4].copy_from_slice(&f32::NAN.to_le_bytes())).unwrap_err();
    assert!(error.ends_with("holds values that are no numbers"), "{error}");
}

#[test]
fn states_with_any_byte_of_the_header_changed_are_refused_or_read_never_a_panic() {
    let task = &tasks()[3];
    let model = model(&config(Mixer::Aaren, Norm::Pre, task.clone()), 1);
    let mut session = Session::new(&model);
    session.feed(&event(task, 0).to_string()).unwrap();
    let bytes = session.save().unwrap();
    for at in 0..bytes.len() {
        for value in [0, b'"', b'9', 0xff] {
            let mut broken = bytes.clone();
            broken[at] = value;
            if let Ok(mut session) = Session::load(&model, &broken) {
                // Whatever numbers it holds: an answer or an error, never NaN.
                if let Ok(said) = session.feed(&event(task, 1).to_string()) {
                    assert!(said["action"][0].is_number(), "{said}");
                }
            }
        }
    }
    for cut in 0..bytes.len() {
        assert!(Session::load(&model, &bytes[..cut]).is_err(), "{cut}");
    }
}
