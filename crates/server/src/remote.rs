//! A tier on another machine: whatever `opendal` can talk to; built in are folders, Redis (and Valkey) and S3.
//!
//! A block is an object named by its key. How much is kept and how long is the store's business: an S3 life cycle, Redis' `maxmemory`
//! and `default_ttl`. Who may write there can only cost hits: objects are checked against their block.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant};

use antefix_kv::disk::Directory;
use antefix_kv::tiers::{Tier, TierError, TierStats, object};
use antefix_kv::{BlockName, Fingerprint};
use opendal::{ErrorKind, Operator};

/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(1);

/// After an error, the store is left alone for this long.
const PAUSE: Duration = Duration::from_secs(10);

/// Blocks in a store.
pub(crate) struct Remote {
    store: Operator,
    fingerprint: Fingerprint,
    runtime: tokio::runtime::Runtime,
    name: String,
    stats: TierStats,
    /// Until when, after an error.
    paused: Option<Instant>,
}

impl Remote {
    /// Opens a store: `fs:///folder`, `redis://host:6379`, `s3://bucket/prefix`, with `opendal`'s options for it. Nothing is sent yet.
    ///
    /// # Errors
    /// When there is no such service, or its options make no sense.
    pub(crate) fn open(
        uri: &str,
        options: &BTreeMap<String, String>,
        fingerprint: Fingerprint,
    ) -> Result<Self, TierError> {
        let told = |e: &dyn std::fmt::Display| TierError(format!("the store at {uri}: {e}"));
        opendal::install_default();
        let store = Operator::from_uri((uri, options.clone())).map_err(|e| told(&e))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| told(&e))?;
        Ok(Self {
            name: store.info().scheme().to_owned(),
            store,
            fingerprint,
            runtime,
            stats: TierStats::default(),
            paused: None,
        })
    }

    /// `<first two digits>/<key>`: folders of moderate size.
    fn path(block: &BlockName) -> String {
        let key = block.key().hex();
        format!("{}/{key}", &key[..2])
    }

    /// Waits for the store, not for long; after an error not at all for a while.
    fn ask<T>(&mut self, what: impl Future<Output = opendal::Result<T>>) -> Result<Option<T>, TierError> {
        if self.paused.is_some_and(|until| Instant::now() < until) {
            return Err(TierError(self.stats.off.clone().unwrap_or_default()));
        }
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, what).await });
        let why = match answer {
            Ok(Ok(value)) => {
                self.paused = None;
                self.stats.off = None;
                return Ok(Some(value));
            }
            Ok(Err(error)) if error.kind() == ErrorKind::NotFound => {
                self.paused = None;
                self.stats.off = None;
                return Ok(None);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} ms", PATIENCE.as_millis()),
        };
        self.paused = Some(Instant::now() + PAUSE);
        self.stats.off = Some(why.clone());
        Err(TierError(why))
    }
}

impl Tier for Remote {
    fn put(&mut self, block: &BlockName, payload: &[u8]) -> Result<(), TierError> {
        let path = Self::path(block);
        let store = self.store.clone();
        let known = self.ask(async { store.stat(&path).await })?;
        if known.is_some() {
            return Ok(());
        }
        let object = object::seal(block, self.fingerprint.root(block.salt), payload);
        let len = object.len() as u64;
        self.ask(async { store.write(&path, object).await })?;
        self.stats.bytes_written += len;
        Ok(())
    }

    fn get(&mut self, block: &BlockName, payload: &mut Vec<u8>) -> bool {
        let path = Self::path(block);
        let store = self.store.clone();
        let Ok(Some(found)) = self.ask(async { store.read(&path).await }) else {
            self.stats.misses += 1;
            return false;
        };
        let object = found.to_vec();
        let root = self.fingerprint.root(block.salt);
        let Some(bytes) = object::open(block, root, &object) else {
            self.stats.misses += 1;
            self.stats.bad += 1;
            // The next one to store it writes it anew.
            let _ = self.ask(async { store.delete(&path).await });
            return false;
        };
        payload.clear();
        payload.extend_from_slice(bytes);
        self.stats.hits += 1;
        self.stats.bytes_read += bytes.len() as u64;
        true
    }

    fn flush(&mut self) -> Result<(), TierError> {
        Ok(()) // what was written is the store's
    }

    fn clear(&mut self) -> Result<(), TierError> {
        Err(TierError("a remote store is emptied by its own tools".into()))
    }

    fn stats(&self) -> TierStats {
        TierStats {
            name: self.name.clone(),
            ..self.stats.clone()
        }
    }

    fn directory(&self) -> Option<Directory> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(fingerprint: Fingerprint, blocks: u32) -> Vec<BlockName> {
        let mut parent = fingerprint.root(3);
        let mut next = |n: u32| {
            let block = BlockName {
                parent,
                salt: 3,
                tokens: std::array::from_fn(|i| n * 40 + i as u32),
            };
            parent = block.key();
            block
        };
        (0..blocks).map(&mut next).collect()
    }

    fn fingerprint(n: u8) -> Fingerprint {
        antefix_kv::Identity {
            model: [n; 32],
            layout: String::new(),
        }
        .fingerprint()
    }

    /// What every store must do.
    fn keeps_blocks(uri: &str) -> Remote {
        let open = |n| Remote::open(uri, &BTreeMap::new(), fingerprint(n)).unwrap();
        let mut tier = open(1);
        let blocks = chain(fingerprint(1), 4);
        let payload = |n: usize| vec![n as u8; 5000 + n];
        let mut out = Vec::new();
        for (n, block) in blocks.iter().enumerate() {
            assert!(!tier.get(block, &mut out));
            tier.put(block, &payload(n)).unwrap();
            tier.put(block, b"a second time is none").unwrap();
        }
        let mut again = open(1);
        for (n, block) in blocks.iter().enumerate() {
            assert!(again.get(block, &mut out));
            assert_eq!(out, payload(n));
        }
        assert_eq!(
            (again.stats().hits, again.stats().misses, again.stats().bad),
            (4, 0, 0)
        );
        assert!(
            !open(2).get(&chain(fingerprint(2), 1)[0], &mut out),
            "another model"
        );
        again
    }

    #[test]
    fn a_folder_keeps_blocks_and_damage_is_a_miss() {
        let dir = tempfile::TempDir::new().unwrap();
        let uri = format!("fs://{}", dir.path().display());
        let mut tier = keeps_blocks(&uri);
        assert_eq!(tier.stats().name, "fs");
        let blocks = chain(fingerprint(1), 4);
        let file = |n: usize| dir.path().join(Remote::path(&blocks[n]));
        let whole = std::fs::read(file(0)).unwrap();
        let mut out = Vec::new();
        std::fs::write(file(0), &whole[..whole.len() - 1]).unwrap();
        std::fs::write(file(1), &whole).unwrap();
        std::fs::remove_file(file(2)).unwrap();
        for block in &blocks[..3] {
            assert!(!tier.get(block, &mut out));
        }
        assert!(tier.get(&blocks[3], &mut out));
        assert_eq!(tier.stats().bad, 2);
        tier.put(&blocks[0], &[7; 100]).unwrap();
        assert!(tier.get(&blocks[0], &mut out));
        assert_eq!(out, [7; 100]);
    }

    #[test]
    fn a_store_that_does_not_answer_is_left_alone() {
        // Nobody listens there.
        let mut tier = Remote::open("redis://127.0.0.1:9", &BTreeMap::new(), fingerprint(1)).unwrap();
        let block = &chain(fingerprint(1), 1)[0];
        let mut out = Vec::new();
        assert!(!tier.get(block, &mut out));
        assert!(tier.stats().off.is_some());
        let began = Instant::now();
        (0..1000).for_each(|_| assert!(tier.put(block, b"x").is_err()));
        assert!(began.elapsed() < PATIENCE, "it is not even asked");
    }

    /// `ANTEFIX_REDIS=redis://127.0.0.1:6379 cargo test -p antefix-server --features remote-cache`
    #[test]
    fn redis_keeps_blocks() {
        match std::env::var("ANTEFIX_REDIS") {
            Ok(uri) => drop(keeps_blocks(&uri)),
            Err(_) => eprintln!("not run: ANTEFIX_REDIS names no server"),
        }
    }
}
