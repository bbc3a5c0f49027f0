//! The threads that share one computation at a time.
//!
//! Decoding a token is some two hundred matrix products of a few dozen microseconds each, one after the
//! other. So a worker that has run out of work looks for the next job for 50 µs before it sleeps, and
//! the caller works too: a job whose helpers are late, or not scheduled at all, is finished by its caller
//! alone. Nothing spins while the program does something else.
//!
//! Invariants
//! * One job at a time. A call made while another runs, from another thread or from inside a job, runs on
//!   its own thread alone. So no call ever waits for a thread that waits for it.
//! * A job is on its caller's stack. The caller returns only after it has closed the job and every worker
//!   that had entered it has left; nobody can enter a closed job.
//! * A panic in a task stops the job and continues in the caller, as with `std::thread::scope`.
//!
//! Which thread runs which task is left open, so results must not depend on it; all users in this crate
//! write disjoint outputs that each depend on one task only.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;

/// How long an idle worker looks for the next job before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// The pool is in use already, so its size can no longer be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the number of threads cannot be set to {asked}: {running} are running already")]
#[non_exhaustive]
pub struct SetThreadsError {
    /// Threads asked for.
    pub asked: usize,
    /// Threads running.
    pub running: usize,
}

static GLOBAL: OnceLock<Pool> = OnceLock::new();

/// Sets the number of threads of this pool and of rayon's global pool; 0 means one per CPU. To be called
/// once, by the program, before the first computation.
///
/// # Errors
/// [`SetThreadsError`] if the pool has already started with another number of threads.
pub fn set_threads(threads: usize) -> Result<(), SetThreadsError> {
    let asked = if threads == 0 { default_threads() } else { threads };
    let running = GLOBAL.get_or_init(|| Pool::new(asked)).threads();
    // An error here means that rayon's pool runs already, with a size that somebody else chose.
    drop(rayon::ThreadPoolBuilder::new().num_threads(asked).build_global());
    if running == asked {
        Ok(())
    } else {
        Err(SetThreadsError { asked, running })
    }
}

/// Threads that work on one computation, the caller included.
pub fn threads() -> usize {
    global().threads()
}

/// Calls `task(0)`, …, `task(tasks − 1)`, each once, on any thread and in any order, and returns when all are
/// done.
///
/// # Panics
/// With the panic of a task, after all running tasks have ended; some may then not have run.
pub fn run(tasks: usize, task: impl Fn(usize) + Sync) {
    global().run(tasks, &task);
}

/// Splits `data` into chunks of `chunk` elements, the last one shorter, and calls `task(index, chunk)` for each.
///
/// # Panics
/// If `chunk` is 0; with the panic of a task.
pub fn for_each_chunk<T: Send>(data: &mut [T], chunk: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    global().for_each_chunk(data, chunk, task);
}

/// Where data begins whose chunks go to several threads.
struct Start<T>(*mut T);

#[expect(unsafe_code, reason = "see `for_each_chunk`")]
// SAFETY: used for nothing but handing out disjoint exclusive borrows, which `T: Send` allows.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    /// The element at `index`, which must be one of the data.
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// The pool of the process.
pub(crate) fn global() -> &'static Pool {
    GLOBAL.get_or_init(|| Pool::new(default_threads()))
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Set in [`Shared::state`] while a job may be entered.
const OPEN: u64 = 1 << 31;
/// The workers inside the job; the bits above `OPEN` number the jobs.
const INSIDE: u64 = OPEN - 1;

struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Runs tasks until none is left, here or elsewhere.
    fn work(&self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= self.tasks {
                    break;
                }
                (self.task)(index);
            }
        }));
        if let Err(panic) = outcome {
            self.next.store(self.tasks, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

struct Shared {
    /// Number of the job, [`OPEN`], and the number of workers [`INSIDE`], in one word.
    state: AtomicU64,
    /// The job; may be dereferenced by who is counted in `state`.
    job: AtomicPtr<Job<'static>>,
    /// Held by the caller whose job it is.
    taken: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

/// A set of worker threads; see the module.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller included. Threads that cannot be started are done without.
    pub(crate) fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: AtomicPtr::default(),
            taken: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let spawn = |index| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("nash-{index}"))
                .spawn(move || shared.serve())
                .ok()
        };
        let workers = (1..threads).map_while(spawn).collect();
        Pool { shared, workers }
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Threads that a call made now would have, unless another one comes before it: the caller alone while the pool is in use.
    pub(crate) fn helping_threads(&self) -> usize {
        if self.shared.taken.load(Ordering::Relaxed) {
            1
        } else {
            self.threads()
        }
    }

    /// See [`for_each_chunk`].
    pub(crate) fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk > 0, "chunks of no elements");
        if data.len() <= chunk {
            if !data.is_empty() {
                task(0, data);
            }
            return;
        }
        let (start, len) = (Start(data.as_mut_ptr()), data.len());
        self.run(len.div_ceil(chunk), &|index| {
            let first = index * chunk;
            #[expect(
                unsafe_code,
                reason = "chunks handed out to threads without a lock or a list of them"
            )]
            // SAFETY: `data` is borrowed exclusively until `run` returns; `run` calls each index below `⌈len / chunk⌉` once, and
            // the chunks `first..first + chunk` of different indices do not overlap and end with the data.
            let chunk = unsafe { std::slice::from_raw_parts_mut(start.at(first), chunk.min(len - first)) };
            task(index, chunk);
        });
    }

    pub(crate) fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let alone = tasks <= 1 || self.workers.is_empty();
        if alone || self.shared.taken.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(task);
            return;
        }
        let job = Job {
            task,
            tasks,
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
        };
        self.shared.publish(&job);
        job.work();
        self.shared.close();
        self.shared.taken.store(false, Ordering::Release);
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for worker in self.workers.drain(..) {
            drop(worker.join());
        }
    }
}

impl Shared {
    /// Opens a job to the workers. The caller has `taken` and must `close` before `job` goes away.
    fn publish(&self, job: &Job<'_>) {
        self.job.store(
            (&raw const *job).cast::<Job<'static>>().cast_mut(),
            Ordering::Relaxed,
        );
        let number = self.state.load(Ordering::Relaxed) >> 32;
        // SeqCst with the load of `sleepers`: either a worker going to sleep sees this job, or it is seen here.
        self.state.store((number + 1) << 32 | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake_all();
        }
    }

    /// Lets no further worker in and waits until all that are inside have left.
    fn close(&self) {
        let mut inside = self.state.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE;
        let mut rounds = 0u32;
        while inside != 0 {
            rounds += 1;
            if rounds < 1000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            inside = self.state.load(Ordering::Acquire) & INSIDE;
        }
    }

    fn wake_all(&self) {
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.notify_all();
    }

    /// A worker's life.
    fn serve(&self) {
        let mut served = 0;
        while let Some(number) = self.wait_for_job(served) {
            served = number;
            if self.enter(number) {
                let job = self.job.load(Ordering::Relaxed);
                #[expect(unsafe_code, reason = "a job lives on its caller's stack")]
                // SAFETY: `enter` counted this worker in the open job `number`, whose caller stored the pointer
                // before it opened the job (the successful exchange in `enter` acquires that) and keeps the job
                // alive and in place until the count is back at zero. `Job` is only used through shared
                // references, and its fields are `Sync`. The lifetime `'static` does not escape this block.
                unsafe {
                    (*job).work();
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Counts this worker in, if job `number` is still open.
    fn enter(&self, number: u64) -> bool {
        let may_enter = |state: u64| (state >> 32 == number && state & OPEN != 0).then_some(state + 1);
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, may_enter)
            .is_ok()
    }

    /// The number of an open job other than `served`; `None` when the pool ends. Spins, then sleeps.
    fn wait_for_job(&self, served: u64) -> Option<u64> {
        let open = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & OPEN != 0 && state >> 32 != served).then_some(state >> 32)
        };
        let begin = Instant::now();
        while begin.elapsed() < SPIN {
            for _ in 0..32 {
                if let Some(number) = open() {
                    return Some(number);
                }
                std::hint::spin_loop();
            }
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let found = loop {
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            if let Some(number) = open() {
                break Some(number);
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `tasks` tasks and checks that each ran once.
    fn check(pool: &Pool, tasks: usize) {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in 1..9 {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..2000 {
                check(&pool, round % 40);
            }
        }
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let pool = Pool::new(3);
        for _ in 0..30 {
            std::thread::sleep(SPIN * 4);
            // Two tasks that wait for each other end only if a second thread comes.
            let barrier = std::sync::Barrier::new(2);
            pool.run(2, &|_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn nested_and_concurrent_calls_end() {
        let pool = Pool::new(4);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, &|_| {
                            pool.run(7, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 5 * 7);
    }

    #[test]
    fn calls_from_rayon_threads_end() {
        let total = AtomicUsize::new(0);
        rayon::scope(|scope| {
            for _ in 0..50 {
                scope.spawn(|_| {
                    run(20, |_| {
                        total.fetch_add(1, Ordering::Relaxed);
                    });
                });
            }
        });
        assert_eq!(total.into_inner(), 1000);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for round in 0..100 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(50, &|i| assert!(i != round % 50, "task {i}"));
            }));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("task {}", round % 50));
            check(&pool, 20);
        }
    }

    #[test]
    fn chunks_cover_the_slice() {
        let mut data = vec![0; 1003];
        for_each_chunk(&mut data, 10, |index, chunk| chunk.fill(index + 1));
        assert!(data.iter().enumerate().all(|(i, &v)| v == i / 10 + 1));
    }
}
