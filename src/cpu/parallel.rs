//! Work over the threads of the current rayon pool.

use std::sync::Mutex;

use super::simd::Isa;

/// Nanoseconds of work that is not worth waking another thread for.
const WAKING: usize = 20_000;

/// Threads of the current pool.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Whether so many nanoseconds of work stay on the thread of the caller.
pub fn is_brief(nanoseconds: usize) -> bool {
    nanoseconds <= WAKING
}

/// [`run`] for tasks that take about so many nanoseconds on one thread, all together: few stay on that of the caller.
pub fn run_brief<Task: Send, Scratch>(
    nanoseconds: usize,
    tasks: Vec<Task>,
    scratch: impl Fn() -> Scratch + Sync,
    work: impl Fn(&mut Scratch, Task) + Sync,
) {
    if !is_brief(nanoseconds) {
        return run(tasks, scratch, work);
    }
    if !tasks.is_empty() {
        let mut scratch = scratch();
        tasks.into_iter().for_each(|task| work(&mut scratch, task));
    }
}

/// Runs `work` on every task. Workers, of which the caller is one, take tasks from the end of the list one by one, so put
/// long tasks last; each worker makes one scratch and keeps it. Results must not depend on which worker runs a task.
pub fn run<Task: Send, Scratch>(
    tasks: Vec<Task>,
    scratch: impl Fn() -> Scratch + Sync,
    work: impl Fn(&mut Scratch, Task) + Sync,
) {
    let workers = rayon::current_num_threads().min(tasks.len());
    let queue = Mutex::new(tasks);
    let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
    let worker = || {
        // Who comes late finds nothing to do.
        let Some(mut task) = next() else { return };
        let mut scratch = scratch();
        loop {
            work(&mut scratch, task);
            task = match next() {
                Some(task) => task,
                None => return,
            };
        }
    };
    if workers <= 1 {
        return worker();
    }
    rayon::in_place_scope(|scope| {
        for _ in 1..workers {
            scope.spawn(|_| worker());
        }
        worker();
    });
}

/// Runs calls that are parallel in themselves, side by side, on the instruction set of the caller, which other threads need
/// not be forced to; `work` tells how their lengths compare.
pub fn run_calls<Call: Send>(mut calls: Vec<Call>, work: impl Fn(&Call) -> usize, run_one: impl Fn(Isa, Call) + Sync) {
    let isa = Isa::current();
    if calls.len() <= 1 {
        return calls.into_iter().for_each(|call| run_one(isa, call));
    }
    calls.sort_by_key(work);
    run(calls, || (), |_, call| run_one(isa, call));
}

/// Into how many pieces to cut each of `units` equal pieces of work so that every thread has its share; 1 when
/// there are plenty, or they divide evenly.
pub fn pieces(units: usize) -> usize {
    let threads = rayon::current_num_threads();
    if units == 0 || units >= 4 * threads || units.is_multiple_of(threads) { 1 } else { (2 * threads).div_ceil(units) }
}
