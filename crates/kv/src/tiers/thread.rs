//! The thread that talks to the tiers, and how others talk to it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Tier, TierStats};
use crate::disk::Directory;
use crate::key::{BlockName, Key};

/// A pause after which what was written is put on the disk for good; with no pause it happens every [`FLUSH_EVERY`].
const FLUSH_PAUSE: Duration = Duration::from_millis(50);
const FLUSH_EVERY: Duration = Duration::from_secs(2);

/// What a fetch brings, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The next block, and the place of its tier in the list.
    Block {
        /// Bytes as [`crate::Pool::export_block`] has written them.
        payload: Vec<u8>,
        /// 0 = the first tier.
        tier: usize,
    },
    /// All that was asked for has come, or the next block is nowhere.
    End {
        /// Whether everything was found.
        complete: bool,
    },
}

struct Fetch {
    blocks: VecDeque<BlockName>,
    inbox: Sender<Fetched>,
}

type Ask = Box<dyn FnOnce(&mut [Box<dyn Tier>]) -> Tell + Send>;
/// Sends the answer to whoever asked.
type Tell = Box<dyn FnOnce()>;

#[derive(Default)]
struct Queue {
    asks: VecDeque<Ask>,
    fetches: VecDeque<Fetch>,
    writes: VecDeque<(BlockName, Vec<u8>)>,
    write_bytes: usize,
    refused: u64,
    closing: bool,
    /// The thread has ended; nothing that is queued will ever be done.
    dead: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    stats: Mutex<Vec<TierStats>>,
    /// One for each tier, once they are open.
    directories: OnceLock<Vec<Option<Directory>>>,
    write_limit: usize,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, tiers: &[Box<dyn Tier>]) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) =
            tiers.iter().map(|t| t.stats()).collect();
    }
}

/// Figures of all tiers and of the line before them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TiersStats {
    /// One for each tier, in order.
    pub tiers: Vec<TierStats>,
    /// Blocks that wait to be stored.
    pub queued: usize,
    /// Their bytes.
    pub queued_bytes: usize,
    /// Blocks that were not taken because the line was full.
    pub refused: u64,
    /// Whether the thread is there: `false` after the end, or if it could not start.
    pub alive: bool,
}

/// Tiers behind a thread of their own, asked in order. Dropping it stores what waits and ends the thread.
pub struct Tiers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Tiers {
    /// Starts the thread; `open` runs on it, so that a large folder delays nobody. At most `write_bytes` bytes wait to be stored.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(
        open: impl FnOnce() -> Vec<Box<dyn Tier>> + Send + 'static,
        write_bytes: usize,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            write_limit: write_bytes,
            ..Shared::default()
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("cache tiers".into())
            .spawn(move || {
                let _ = catch_unwind(AssertUnwindSafe(|| run(&theirs, open)));
                let mut queue = theirs.queue();
                // Dropped, so that whoever waits for an answer learns that there is none.
                *queue = Queue {
                    dead: true,
                    refused: queue.refused,
                    ..Queue::default()
                };
            })?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Whether a block of `bytes` bytes would be taken now.
    pub fn has_room(&self, bytes: usize) -> bool {
        let queue = self.shared.queue();
        !queue.dead && (queue.writes.is_empty() || queue.write_bytes + bytes <= self.shared.write_limit)
    }

    /// Hands a block over to be stored in every tier; `false` if the line is full and it was not taken.
    pub fn put(&self, block: BlockName, payload: Vec<u8>) -> bool {
        if !self.has_room(payload.len()) {
            self.shared.queue().refused += 1;
            return false;
        }
        let mut queue = self.shared.queue();
        queue.write_bytes += payload.len();
        queue.writes.push_back((block, payload));
        drop(queue);
        self.shared.wake.notify_one();
        true
    }

    /// Reads `blocks`, each the parent of the next, until one is nowhere to be found. Dropping the receiver ends it.
    pub fn fetch(&self, blocks: Vec<BlockName>) -> Receiver<Fetched> {
        let (inbox, answers) = mpsc::channel();
        let mut queue = self.shared.queue();
        if !queue.dead {
            queue.fetches.push_back(Fetch {
                blocks: blocks.into(),
                inbox,
            });
        }
        drop(queue);
        self.shared.wake.notify_one();
        answers
    }

    /// Whether some tier may have the block: at once, and without touching it. Before they are open, nothing is there; a tier that
    /// would have to ask somebody always may.
    pub fn may_have(&self, key: &Key) -> bool {
        let has = |d: &Option<Directory>| d.as_ref().is_none_or(|d| d.contains(key));
        self.shared
            .directories
            .get()
            .is_some_and(|all| all.iter().any(has))
    }

    /// Whether some tier knows without asking that it has the block.
    pub fn knows(&self, key: &Key) -> bool {
        let has = |d: &Option<Directory>| d.as_ref().is_some_and(|d| d.contains(key));
        self.shared
            .directories
            .get()
            .is_some_and(|all| all.iter().any(has))
    }

    /// Whether the tiers are open and can be asked.
    pub fn is_open(&self) -> bool {
        self.shared.directories.get().is_some()
    }

    /// Runs `look` on the tiers, between two blocks. Nothing is ever answered when the thread has ended.
    pub fn ask<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut [Box<dyn Tier>]) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (reply, answer) = mpsc::channel();
        let mut queue = self.shared.queue();
        if !queue.dead {
            queue.asks.push_back(Box::new(move |tiers| {
                let answer = look(tiers);
                Box::new(move || {
                    let _ = reply.send(answer); // nobody waits any more
                })
            }));
        }
        drop(queue);
        self.shared.wake.notify_one();
        answer
    }

    /// Waits until the tiers can be asked, at most for `patience`.
    pub fn wait_open(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !self.is_open() && self.stats().alive && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.is_open()
    }

    /// Figures for reports; those of the tiers are from the last time that they were idle or a second old.
    pub fn stats(&self) -> TiersStats {
        let queue = self.shared.queue();
        TiersStats {
            queued: queue.writes.len(),
            queued_bytes: queue.write_bytes,
            refused: queue.refused,
            alive: !queue.dead,
            tiers: self
                .shared
                .stats
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }

    /// Stores what waits, closes the tiers and ends the thread. Afterwards nothing is found and nothing is taken.
    pub fn close(&self) {
        self.shared.queue().closing = true;
        self.shared.wake.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join(); // its panics are caught
        }
    }
}

impl Drop for Tiers {
    fn drop(&mut self) {
        self.close();
    }
}

/// The next thing to do. Answers go before reads, and reads before writes: somebody waits for them.
enum Task {
    Ask(Ask),
    /// One block of a fetch.
    Read(Fetch),
    Write(BlockName, Vec<u8>),
    Flush,
    Rest,
    End,
}

fn run(shared: &Shared, open: impl FnOnce() -> Vec<Box<dyn Tier>>) {
    let mut tiers = open();
    shared.publish(&tiers);
    let _ = shared
        .directories
        .set(tiers.iter().map(|t| t.directory()).collect()); // nobody else sets it
    let mut unflushed: Option<Instant> = None;
    let mut published = Instant::now();
    let mut payload = Vec::new();
    loop {
        match next_task(shared, unflushed) {
            Task::Ask(ask) => {
                let tell = ask(&mut tiers);
                // Whoever has the answer finds the figures that belong to it.
                shared.publish(&tiers);
                tell();
            }
            Task::Read(fetch) => read(shared, &mut tiers, fetch, &mut payload),
            Task::Write(block, payload) => {
                for tier in &mut tiers {
                    // The tier remembers why and its figures say so; what it does not store is computed again.
                    let _ = tier.put(&block, &payload);
                }
                unflushed.get_or_insert_with(Instant::now);
                shared.queue().write_bytes -= payload.len();
            }
            Task::Flush => {
                for tier in &mut tiers {
                    let _ = tier.flush(); // as above
                }
                unflushed = None;
                shared.publish(&tiers);
            }
            Task::Rest => {
                shared.publish(&tiers);
                continue;
            }
            Task::End => return,
        }
        if published.elapsed() > Duration::from_secs(1) {
            published = Instant::now();
            shared.publish(&tiers);
        }
    }
}

fn next_task(shared: &Shared, unflushed: Option<Instant>) -> Task {
    let mut queue = shared.queue();
    let mut rested = false;
    loop {
        if let Some(ask) = queue.asks.pop_front() {
            return Task::Ask(ask);
        }
        if !queue.closing
            && let Some(fetch) = queue.fetches.pop_front()
        {
            return Task::Read(fetch);
        }
        let overdue = unflushed.is_some_and(|since| since.elapsed() > FLUSH_EVERY);
        if !overdue && let Some((block, payload)) = queue.writes.pop_front() {
            return Task::Write(block, payload);
        }
        if unflushed.is_some() && (overdue || rested || queue.closing) {
            return Task::Flush;
        }
        if queue.closing {
            return Task::End;
        }
        if rested {
            return Task::Rest;
        }
        let pause = if unflushed.is_some() {
            FLUSH_PAUSE
        } else {
            Duration::from_mins(1)
        };
        let waited = shared
            .wake
            .wait_timeout(queue, pause)
            .unwrap_or_else(PoisonError::into_inner);
        queue = waited.0;
        rested = waited.1.timed_out();
    }
}

/// Reads one block of `fetch` and puts the rest behind the other fetches, so that a long one delays nobody much.
fn read(shared: &Shared, tiers: &mut [Box<dyn Tier>], mut fetch: Fetch, payload: &mut Vec<u8>) {
    let Some(block) = fetch.blocks.pop_front() else {
        let _ = fetch.inbox.send(Fetched::End { complete: true }); // nobody waits any more
        return;
    };
    let Some(at) = tiers.iter_mut().position(|tier| tier.get(&block, payload)) else {
        let _ = fetch.inbox.send(Fetched::End { complete: false });
        return;
    };
    // What was far away is nearer the next time.
    for tier in &mut tiers[..at] {
        let _ = tier.put(&block, payload);
    }
    let found = Fetched::Block {
        payload: std::mem::take(payload),
        tier: at,
    };
    if fetch.inbox.send(found).is_ok() {
        shared.queue().fetches.push_back(fetch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{DiskTier, Limits};
    use crate::key::{BlockTokens, Fingerprint, Identity};
    use tempfile::TempDir;

    fn tokens(n: u32) -> BlockTokens {
        std::array::from_fn(|i| n * 100 + i as u32)
    }

    fn chain(root: Key, blocks: u32) -> Vec<BlockName> {
        let mut parent = root;
        let mut name = |n| {
            let block = BlockName {
                parent,
                salt: 7,
                tokens: tokens(n),
            };
            parent = block.key();
            block
        };
        (0..blocks).map(&mut name).collect()
    }

    fn identity() -> Identity {
        Identity {
            model: [3; 32],
            layout: "test".into(),
        }
    }

    fn tiers(dir: &TempDir) -> Tiers {
        let path = dir.path().to_owned();
        let open = move || -> Vec<Box<dyn Tier>> {
            vec![Box::new(
                DiskTier::open(&path, &identity(), Limits::new(1 << 20)).unwrap(),
            )]
        };
        Tiers::start(open, 4000).unwrap()
    }

    fn read_all(answers: &Receiver<Fetched>) -> (Vec<Vec<u8>>, bool) {
        let mut found = Vec::new();
        loop {
            match answers.recv().unwrap() {
                Fetched::Block { payload, .. } => found.push(payload),
                Fetched::End { complete } => return (found, complete),
            }
        }
    }

    #[test]
    fn what_was_put_is_fetched_also_after_the_end() {
        let dir = TempDir::new().unwrap();
        let names = chain(identity().fingerprint().root(7), 3);
        let payloads: Vec<Vec<u8>> = (0..3).map(|n| vec![n as u8; 900]).collect();
        let first = tiers(&dir);
        for (name, payload) in names.iter().zip(&payloads) {
            while !first.put(name.clone(), payload.clone()) {
                std::thread::yield_now();
            }
        }
        drop(first);
        let second = tiers(&dir);
        assert_eq!(read_all(&second.fetch(names.clone())), (payloads.clone(), true));
        assert!(second.knows(&names[2].key()) && second.may_have(&names[2].key()));
        let longer = chain(identity().fingerprint().root(7), 5);
        assert_eq!(read_all(&second.fetch(longer)), (payloads, false));
        let stats = second.ask(|tiers| tiers[0].stats()).recv().unwrap();
        assert_eq!((stats.hits, stats.misses, stats.blocks), (6, 1, Some(3)));
        second.close();
        assert!(second.fetch(names).recv().is_err(), "nobody answers any more");
    }

    /// Holds everybody up until it is told to go on.
    struct Slow(Receiver<()>);

    impl Tier for Slow {
        fn put(&mut self, _: &BlockName, _: &[u8]) -> Result<(), super::super::TierError> {
            let _ = self.0.recv();
            Ok(())
        }
        fn get(&mut self, _: &BlockName, _: &mut Vec<u8>) -> bool {
            panic!("a tier that breaks")
        }
        fn flush(&mut self) -> Result<(), super::super::TierError> {
            Ok(())
        }
        fn clear(&mut self) -> Result<(), super::super::TierError> {
            Ok(())
        }
        fn stats(&self) -> TierStats {
            TierStats::default()
        }
        fn directory(&self) -> Option<Directory> {
            None
        }
    }

    #[test]
    fn a_slow_tier_makes_nobody_wait_and_a_broken_one_is_gone() {
        let (go, wait) = mpsc::channel();
        let tiers = Tiers::start(move || vec![Box::new(Slow(wait)) as Box<dyn Tier>], 2000).unwrap();
        let names = chain(Fingerprint::default().root(0), 20);
        let began = Instant::now();
        let taken = names
            .iter()
            .filter(|n| tiers.put((*n).clone(), vec![0; 500]))
            .count();
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!((4..=5).contains(&taken), "{taken}: the line is bounded");
        let stats = tiers.stats();
        assert_eq!(stats.refused, 20 - taken as u64);
        assert!(stats.queued_bytes <= 2500);
        drop(go);
        let answers = tiers.fetch(names);
        assert!(answers.recv().is_err(), "the thread broke and says so");
        // It drops what it held before it says that it is gone.
        while tiers.stats().alive && began.elapsed() < Duration::from_secs(5) {
            std::thread::yield_now();
        }
        assert!(!tiers.put(chain(Fingerprint::default().root(0), 1).remove(0), vec![0]));
        assert!(!tiers.stats().alive);
    }
}
