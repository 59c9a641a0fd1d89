//! Where the blocks of a tier are: written by the tier alone, asked by anybody.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use super::{Place, is_expired, now};
use crate::key::Key;

/// What a tier remembers of its blocks. Clones show the same blocks, so that whoever has one can ask while the tier works.
#[derive(Debug, Clone)]
pub struct Directory {
    places: Arc<RwLock<HashMap<Key, Place>>>,
    ttl: Option<Duration>,
}

impl Directory {
    pub(super) fn new(ttl: Option<Duration>) -> Self {
        Self {
            places: Arc::default(),
            ttl,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<Key, Place>> {
        self.places.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<Key, Place>> {
        self.places.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a block is remembered. A promise only: reading it may still find it damaged.
    pub fn contains(&self, key: &Key) -> bool {
        let place = self.get(key);
        place.is_some_and(|p| !is_expired(p.entry.created, now(), self.ttl))
    }

    pub(super) fn get(&self, key: &Key) -> Option<Place> {
        self.read().get(key).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.read().len()
    }

    /// A copy of all places in `segment`.
    pub(super) fn of_segment(&self, segment: u64) -> Vec<Place> {
        let places = self.read();
        places
            .values()
            .filter(|p| p.segment == segment)
            .copied()
            .collect()
    }

    pub(super) fn insert(&self, key: Key, place: Place) {
        self.write().insert(key, place);
    }

    pub(super) fn remove(&self, key: &Key) {
        self.write().remove(key);
    }

    pub(super) fn retain(&self, mut keep: impl FnMut(&Key, &Place) -> bool) {
        self.write().retain(|key, place| keep(key, place));
    }
}
