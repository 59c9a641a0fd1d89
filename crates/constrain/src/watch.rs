//! Ends what takes too long. An ambiguous grammar can make one mask as expensive as it likes, and a mask is made between two steps of
//! the engine: all requests wait for it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llguidance::CancellationHandle;

/// How often is looked while something runs: what is too long by less may go on.
const TICK: Duration = Duration::from_millis(10);
/// Looks at nothing before it sleeps until it is woken. Waking costs more than most masks.
const IDLE_LOOKS: u32 = 100;

/// A thread that looks at a clock for others.
pub(crate) struct Watch(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Default)]
struct State {
    watched: Vec<Watched>,
    next: u64,
    asleep: bool,
    over: bool,
}

struct Watched {
    id: u64,
    until: Instant,
    handle: CancellationHandle,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) {
        let mut idle = 0;
        let mut state = self.state();
        while !state.over {
            let now = Instant::now();
            for late in state.watched.iter().filter(|w| w.until <= now) {
                late.handle.cancel();
            }
            idle = if state.watched.is_empty() { idle + 1 } else { 0 };
            state.asleep = idle > IDLE_LOOKS;
            state = match state.asleep {
                true => self.woken.wait(state).unwrap_or_else(PoisonError::into_inner),
                false => {
                    self.woken
                        .wait_timeout(state, TICK)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

impl Watch {
    /// # Errors
    /// When the system has no thread left.
    pub(crate) fn new() -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let looking = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("grammars".into())
            .spawn(move || looking.look())?;
        Ok(Self(shared))
    }

    /// Runs `work`, cancels `handle` when that takes longer than `most`, and says how long it took.
    pub(crate) fn run<T>(
        &self,
        handle: CancellationHandle,
        most: Duration,
        work: impl FnOnce() -> T,
    ) -> (T, Duration) {
        let begun = Instant::now();
        let mut state = self.0.state();
        state.next += 1;
        let id = state.next;
        let until = begun + most;
        state.watched.push(Watched { id, until, handle });
        if std::mem::take(&mut state.asleep) {
            self.0.woken.notify_one();
        }
        drop(state);
        let made = work();
        self.0.state().watched.retain(|w| w.id != id);
        (made, begun.elapsed())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.woken.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_takes_too_long_is_cancelled_even_after_a_sleep() {
        let watch = Watch::new().unwrap();
        for _ in 0..2 {
            let quick = CancellationHandle::default();
            let (answer, _) = watch.run(quick.clone(), Duration::from_mins(10), || 7);
            assert!(answer == 7 && !quick.is_cancelled());
            let slow = CancellationHandle::default();
            let ((), took) = watch.run(slow.clone(), Duration::from_millis(20), || {
                while !slow.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            assert!(took >= Duration::from_millis(20), "{took:?}");
            assert!(watch.0.state().watched.is_empty());
            while !watch.0.state().asleep {
                std::thread::sleep(TICK);
            }
        }
    }
}
