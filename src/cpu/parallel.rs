//! Work over the threads of the current rayon pool.

use std::sync::Mutex;

/// Runs `work` on every task. Workers take tasks from the end of the list one by one, so put long tasks last; each
/// worker makes one scratch and keeps it. Results must not depend on which worker runs a task.
pub fn run<Task: Send, Scratch>(
    tasks: Vec<Task>,
    scratch: impl Fn() -> Scratch + Sync,
    work: impl Fn(&mut Scratch, Task) + Sync,
) {
    let workers = rayon::current_num_threads().min(tasks.len());
    let queue = Mutex::new(tasks);
    let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
    let worker = || {
        let mut scratch = scratch();
        while let Some(task) = next() {
            work(&mut scratch, task);
        }
    };
    if workers <= 1 {
        return worker();
    }
    rayon::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|_| worker());
        }
    });
}

/// Into how many pieces to cut each of `units` equal pieces of work so that every thread has its share; 1 when
/// there are plenty, or they divide evenly.
pub fn pieces(units: usize) -> usize {
    let threads = rayon::current_num_threads();
    if units == 0 || units >= 4 * threads || units.is_multiple_of(threads) { 1 } else { (2 * threads).div_ceil(units) }
}
