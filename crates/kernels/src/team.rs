//! A team of threads that lives as long as the model: no thread is started per call.
//!
//! The caller is one of the team. Workers spin for a while between two calls, because a decode step makes hundreds of them a
//! few microseconds apart, and sleep after that.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker spins for the next call before it sleeps.
const SPIN: Duration = Duration::from_micros(150);

type Task = dyn Fn(usize) + Sync;

/// The call at hand. The pointer is only followed by workers that entered the call while it was open; `run` waits for those.
#[derive(Clone, Copy)]
struct Call {
    f: *const Task,
    tasks: usize,
}

// SAFETY: the pointee is `Sync`, and `run` keeps it alive until every worker has left the call.
unsafe impl Send for Call {}

struct Shared {
    /// Counts calls; odd or even means nothing. Workers watch it.
    epoch: AtomicUsize,
    /// Next task of the call.
    next: AtomicUsize,
    /// Workers inside the call. They enter while `call` is locked and open, so a worker that gets no core holds nobody up.
    busy: AtomicUsize,
    stop: AtomicBool,
    /// Workers asleep or about to be; changed while `call` is locked. Waking nobody costs a system call all the same.
    asleep: AtomicUsize,
    call: Mutex<Option<Call>>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Threads that work on one call at a time.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Serialises calls from different threads.
    turn: Mutex<()>,
}

impl Team {
    /// A team of `threads` threads, the caller of [`Team::run`] included; at least 1.
    ///
    /// If the system gives fewer threads, the team is smaller.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            call: Mutex::new(None),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("antefix-{i}"))
                    .spawn(move || shared.work())
                    .ok()
            })
            .collect();
        Self {
            shared,
            workers,
            turn: Mutex::new(()),
        }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)`, `f(1)`, .. `f(tasks - 1)`, each once, on whichever thread is free, and returns when all are done.
    ///
    /// Do not call it from inside a task of the same team.
    ///
    /// # Panics
    /// With the panic of a task, after all threads have left the call.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(f);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let s = &*self.shared;
        // SAFETY: only the lifetime changes; no worker touches the pointer once the call is closed and `busy` is 0, and we wait for
        // that below.
        let f_static = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(f) };
        let call = Call { f: f_static, tasks };
        s.next.store(0, Ordering::Relaxed);
        {
            let mut slot = s.call.lock().unwrap_or_else(PoisonError::into_inner);
            *slot = Some(call);
            s.epoch.fetch_add(1, Ordering::Release);
        }
        if s.asleep.load(Ordering::Relaxed) > 0 {
            s.wake.notify_all();
        }
        s.take_tasks(call);
        *s.call.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let mut spins = 0u32;
        while s.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                // Fewer cores than threads: let the worker that we wait for run.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let panic = s.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// `f(0), f(1), .. f(n - 1)`, as [`Team::run`] calls them.
    ///
    /// # Panics
    /// With the panic of `f`.
    pub fn map<T: Send>(&self, n: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let out: Vec<Mutex<Option<T>>> = (0..n).map(|_| Mutex::new(None)).collect();
        self.run(n, &|i| {
            *out[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(f(i))
        });
        let take = |m: Mutex<Option<T>>| m.into_inner().unwrap_or_else(PoisonError::into_inner);
        out.into_iter().filter_map(take).collect()
    }

    /// Calls `f(index, row)` for every row of `width` values of `data`, in chunks over the team when that pays.
    ///
    /// # Panics
    /// With the panic of `f`, or when `width` is 0 and `data` is not empty.
    pub fn per_row(&self, data: &mut [f32], width: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        /// Values below which waking the others costs more than it saves.
        const ALONE: usize = 16 * 1024;
        if data.len() <= ALONE || self.threads() == 1 {
            data.chunks_exact_mut(width)
                .enumerate()
                .for_each(|(r, row)| f(r, row));
            return;
        }
        let rows = data.len() / width;
        let chunk = rows.div_ceil(self.threads() * 4).max(1);
        let pieces: Vec<Mutex<&mut [f32]>> = data.chunks_mut(chunk * width).map(Mutex::new).collect();
        self.run(pieces.len(), &|i| {
            let mut piece = pieces[i].lock().unwrap_or_else(PoisonError::into_inner);
            piece
                .chunks_exact_mut(width)
                .enumerate()
                .for_each(|(r, row)| f(i * chunk + r, row));
        });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        {
            let _slot = self.shared.call.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks; there is nothing to report here.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        loop {
            self.wait(seen);
            let call = {
                let open = self.call.lock().unwrap_or_else(PoisonError::into_inner);
                seen = self.epoch.load(Ordering::Acquire);
                if open.is_some() {
                    self.busy.fetch_add(1, Ordering::Relaxed);
                }
                *open
            };
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            if let Some(call) = call {
                self.take_tasks(call);
                self.busy.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Waits until the epoch moves on from `seen`: first awake, then asleep.
    fn wait(&self, seen: usize) {
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..64 {
                if self.epoch.load(Ordering::Acquire) != seen {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        let mut slot = self.call.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever moves the epoch holds the lock: it finds us counted, or we find the epoch moved.
        self.asleep.fetch_add(1, Ordering::Relaxed);
        while self.epoch.load(Ordering::Acquire) == seen {
            slot = self.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::Relaxed);
    }

    fn take_tasks(&self, call: Call) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= call.tasks {
                return;
            }
            // SAFETY: `run` waits until this thread has left the call, so the closure is alive.
            let f = unsafe { &*call.f };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(task))) {
                self.panic
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(panic);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_many_small_calls() {
        for threads in [1, 2, 3] {
            let team = Team::new(threads);
            for call in 0..5000 {
                let tasks = call % 7;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_sleeping_team_wakes_up() {
        let team = Team::new(2);
        let sum = AtomicUsize::new(0);
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(5));
            team.run(10, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.load(Ordering::Relaxed), 135);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            team.run(8, &|i| assert_ne!(i, 5, "task five"))
        }));
        let message = *caught.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("task five"), "{message}");
        let sum = AtomicUsize::new(0);
        team.run(4, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn calls_from_two_threads_take_turns() {
        let team = Team::new(2);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let sum = AtomicUsize::new(0);
                        team.run(9, &|i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        assert_eq!(sum.load(Ordering::Relaxed), 36);
                    }
                });
            }
        });
    }

    #[test]
    fn rows_are_handed_out_whole_and_once() {
        let team = Team::new(2);
        let mut data = vec![0.0f32; 300 * 100];
        team.per_row(&mut data, 100, &|r, row| {
            row.iter_mut().for_each(|x| *x += r as f32)
        });
        assert!(
            data.chunks_exact(100)
                .enumerate()
                .all(|(r, row)| row.iter().all(|&x| x == r as f32))
        );
    }
}
