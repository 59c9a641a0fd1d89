//! A tier on another machine: whatever `opendal` can talk to; built in are folders, Redis (and Valkey) and S3.
//!
//! A block is an object named by its key. How much is kept and how long is the store's business: an S3 life cycle, Redis' `maxmemory`
//! and `default_ttl`. Who may write there can only cost hits: objects are checked against their block.

use std::future::Future;
use std::time::{Duration, Instant};

use antefix_kv::disk::Directory;
use antefix_kv::tiers::{Tier, TierError, TierStats, object};
use antefix_kv::{BlockName, Fingerprint};
use opendal::{ErrorKind, Operator};
use tokio::runtime::Runtime;

use crate::tiers::RemoteConfig;

/// After an error, the store is left alone for this long.
const PAUSE: Duration = Duration::from_secs(10);

/// Blocks in a store.
pub(crate) struct Remote {
    store: Operator,
    fingerprint: Fingerprint,
    /// Waits for the store on the thread that asks; `None` only while it is dropped.
    runtime: Option<Runtime>,
    /// An answer that takes longer is none.
    patience: Duration,
    stats: TierStats,
    /// Until when, after an error.
    paused: Option<Instant>,
}

impl Remote {
    /// Opens a store: `fs:///folder`, `redis://host:6379`, `s3://bucket/prefix`, with `opendal`'s options for it. Nothing is sent yet.
    ///
    /// # Errors
    /// When there is no such service, or its options make no sense.
    pub(crate) fn open(config: &RemoteConfig, fingerprint: Fingerprint) -> Result<Self, TierError> {
        opendal::install_default();
        Operator::from_uri((config.uri.as_str(), config.options.clone()))
            .map_err(|e| e.to_string())
            .and_then(|store| Self::of(store, config.patience(), fingerprint).map_err(|e| e.to_string()))
            .map_err(|why| TierError(format!("{}: {why}", config.shown())))
    }

    /// The blocks of a store.
    ///
    /// # Errors
    /// When the system has no means to wait for it.
    fn of(store: Operator, patience: Duration, fingerprint: Fingerprint) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self {
            stats: TierStats {
                name: store.info().scheme().to_owned(),
                ..TierStats::default()
            },
            store,
            fingerprint,
            runtime: Some(runtime),
            patience,
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
        let Some(runtime) = &self.runtime else {
            return Err(TierError("closed".into()));
        };
        let answer = runtime.block_on(async { tokio::time::timeout(self.patience, what).await });
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
            Err(_) => format!("no answer within {} ms", self.patience.as_millis()),
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
        self.stats.clone()
    }

    fn directory(&self) -> Option<Directory> {
        None
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // A runtime that waits for its end may not be dropped by an asynchronous task, which a server's start may be.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests;
