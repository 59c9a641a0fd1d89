//! Faults that hit a whole process: a full disk, a folder that may not be written, SIGKILL.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::disk::server_at;
use crate::{Outcome, Runner, aftermath, expect};

/// Set for a child: the folder of its cache.
const DIR: &str = "ANTEFIX_FAULTS_DIR";

/// The child: a server that answers the prompts again and again and says so. Without its folder it is no child.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_answers() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let rounds: usize = std::env::var("ANTEFIX_FAULTS_ROUNDS").unwrap().parse().unwrap();
    let server = server_at(Path::new(&dir));
    for _ in 0..rounds {
        assert_eq!(aftermath(&server.app()).await, Ok(0));
        println!("\nanswered");
        server.inspect(antefix_engine::Engine::clear_cache).await;
    }
    server
        .inspect(|engine| engine.store_cache(Duration::from_secs(5)))
        .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let stats = server.inspect(|engine| engine.cache_stats()).await.unwrap();
    server.close().await;
    let tiers = stats.below.map(|b| b.tiers).unwrap_or_default();
    println!("\noff: {:?}", tiers.first().and_then(|t| t.off.clone()));
}

fn child(dir: &Path, rounds: usize) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "process::a_child_that_answers",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(DIR, dir)
        .env("ANTEFIX_FAULTS_ROUNDS", rounds.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Runs a child to its end: it must answer right, and say that it stores nothing any more.
fn ends_well(mut command: Command) -> Outcome {
    let done = command.output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stdout);
    expect(&format!("the child ends well: {said}"), done.status.success())?;
    expect(&format!("the child was one: {said}"), said.contains("answered"))?;
    expect(&format!("storing is off: {said}"), said.contains("off: Some("))?;
    Ok(0)
}

/// Files may not grow beyond 8 KiB: what a full disk or a quota does, without a disk to fill.
async fn full_disk() -> Outcome {
    let dir = TempDir::new().unwrap();
    let inner = child(dir.path(), 2);
    let mut shell = Command::new("sh");
    // Signal 25 is SIGXFSZ: ignored, so that a write fails as it does on a full disk.
    shell
        .args(["-c", "trap '' 25; ulimit -f 16; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args())
        .envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    tokio::task::spawn_blocking(|| ends_well(shell))
        .await
        .map_err(|e| e.to_string())?
}

/// Nobody's user, where we are everybody's.
const NOBODY: u32 = 65534;

async fn read_only() -> Outcome {
    let dir = TempDir::new().unwrap();
    let server = server_at(dir.path());
    aftermath(&server.app()).await?;
    server.close().await;
    let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    for file in std::fs::read_dir(dir.path()).unwrap() {
        set(&file.unwrap().path(), 0o444);
    }
    set(dir.path(), 0o555);
    let mut command = child(dir.path(), 2);
    // Root may write anywhere.
    let root = std::fs::write(dir.path().join("probe"), b"").is_ok();
    if root {
        std::fs::remove_file(dir.path().join("probe")).unwrap();
        // Its own copy, for the way to ours may be closed to others.
        let copy = std::env::temp_dir().join(format!("antefix-faults-{}", std::process::id()));
        std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        set(&copy, 0o755);
        let mut other = Command::new(&copy);
        other
            .args(command.get_args())
            .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))))
            .current_dir("/")
            .uid(NOBODY)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        command = other;
    }
    let outcome = tokio::task::spawn_blocking(|| ends_well(command)).await;
    if root {
        let copy = std::env::temp_dir().join(format!("antefix-faults-{}", std::process::id()));
        std::fs::remove_file(copy).unwrap();
    }
    set(dir.path(), 0o755);
    outcome.map_err(|e| e.to_string())?
}

/// A server that stores is killed at a random moment, again and again; whoever comes after it answers right.
async fn killed(times: u64) -> Outcome {
    let dir = TempDir::new().unwrap();
    let path = dir.path().to_owned();
    for n in 0..times {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let mut child = child(&path, 1000).spawn().unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let answered = lines.any(|line| line.unwrap() == "answered");
            // A busy server flushes every two seconds: the first one lives long enough for that.
            let flushed = if n == 0 { 2_500_000 } else { 0 };
            std::thread::sleep(Duration::from_micros(flushed + n * 7919 % 60_000));
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(answered, "the child never answered");
        })
        .await
        .map_err(|e| e.to_string())?;
    }
    let server = server_at(&path);
    let pages = aftermath(&server.app()).await?;
    let stats = server.inspect(|engine| engine.cache_stats()).await.unwrap();
    let blocks: u64 = stats.loaded.iter().sum();
    expect("what was stored is found", blocks > 0)?;
    server.close().await;
    Ok(pages)
}

pub(crate) async fn run(runner: &mut Runner) {
    let off = "right answers, storing is off and says why";
    runner
        .fault("full disk (files may not grow)", off, full_disk())
        .await;
    runner.fault("read-only cache folder", off, read_only()).await;
    runner
        .fault(
            "a storing server killed 20 times (kill -9)",
            "the next ones answer right",
            killed(20),
        )
        .await;
}
