//! What happens to the folder of the cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use antefix_server::{DiskConfig, Server};
use serde_json::json;
use tempfile::TempDir;

use crate::common::{call, post, server_with};
use crate::{Outcome, Runner, aftermath, ask, choices, cold, expect, get, number};

/// A server with a cache folder; `kv_bytes` holds a few prompts only, so that blocks come and go.
pub(crate) fn server_at(dir: &Path) -> Server {
    server_with(|c| {
        c.engine.kv_bytes = 3 << 18;
        c.engine.context = 512;
        c.cache.disk = Some(DiskConfig {
            dir: dir.to_owned(),
            bytes: 64 << 20,
            ttl: Some(Duration::from_hours(24)),
        });
    })
}

/// A folder in which a server has stored all prompts.
async fn filled() -> Result<TempDir, String> {
    let dir = TempDir::new().map_err(|e| e.to_string())?;
    let server = server_at(dir.path());
    aftermath(&server.app()).await?;
    server.close().await;
    Ok(dir)
}

/// A new server on `dir`: right answers, whatever it finds. Returns the leaked blocks and the tokens that came from disk.
async fn restarted(dir: &Path) -> Result<(u64, u64), String> {
    let server = server_at(dir);
    let app = server.app();
    let pages = aftermath(&app).await?;
    let (_, loads) = call(&app, get("/v1/loads")).await;
    server.close().await;
    Ok((pages, number(&loads, "loaded_tokens_total")?))
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let mut files: Vec<PathBuf> = all
        .filter(|f| f.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

/// Changes the bytes of every segment file; then a server must answer right. `Some(false)`: nothing may come from disk any more.
async fn damaged(harm: fn(&mut Vec<u8>), finds: Option<bool>) -> Outcome {
    let dir = filled().await?;
    for file in files(dir.path(), "kv") {
        let mut bytes = fs::read(&file).unwrap();
        harm(&mut bytes);
        fs::write(&file, bytes).unwrap();
    }
    let (pages, loaded) = restarted(dir.path()).await?;
    if let Some(finds) = finds {
        expect(&format!("{loaded} tokens came from disk"), (loaded > 0) == finds)?;
    }
    Ok(pages)
}

async fn nothing_happened() -> Outcome {
    let dir = filled().await?;
    let (pages, loaded) = restarted(dir.path()).await?;
    expect("the prompts come from disk", loaded > 0)?;
    Ok(pages)
}

async fn no_index() -> Outcome {
    let dir = filled().await?;
    for (n, file) in files(dir.path(), "idx").iter().enumerate() {
        match n % 2 {
            0 => fs::write(file, b"nonsense").unwrap(),
            _ => fs::remove_file(file).unwrap(),
        }
    }
    let (pages, loaded) = restarted(dir.path()).await?;
    expect("the headers tell what is there", loaded > 0)?;
    Ok(pages)
}

async fn times(at: SystemTime) -> Outcome {
    let dir = filled().await?;
    for file in files(dir.path(), "kv")
        .into_iter()
        .chain(files(dir.path(), "idx"))
    {
        File::options()
            .append(true)
            .open(file)
            .unwrap()
            .set_modified(at)
            .unwrap();
    }
    let (pages, loaded) = restarted(dir.path()).await?;
    expect("it does not matter", loaded > 0)?;
    Ok(pages)
}

/// The memory's clock runs ahead by a year while a request with an hour to live is cached.
async fn a_year_passes() -> Outcome {
    let server = server_with(|_| ());
    let app = server.app();
    let mut short = ask(0);
    short["prompt_cache_retention"] = "in_memory".into();
    let first = choices(&app, &short).await?;
    let year = Duration::from_hours(24 * 365);
    server
        .inspect(move |engine| engine.advance_cache(year))
        .await
        .unwrap();
    let look = json!({"tokens": crate::prompt(0)});
    let (_, found) = call(&app, post("/v1/cache/lookup", &look)).await;
    expect("it was forgotten", number(&found, "cached_tokens")? == 0)?;
    expect(
        "and is computed again",
        choices(&app, &short).await? == first && first == cold().await[0],
    )?;
    aftermath(&app).await
}

/// Something happens to the folder while the server runs.
async fn beneath(harm: fn(&Path)) -> Outcome {
    let dir = TempDir::new().unwrap();
    let inner = dir.path().join("cache");
    let server = server_at(&inner);
    let app = server.app();
    aftermath(&app).await?;
    server.inspect(|e| e.store_cache(Duration::from_secs(5))).await;
    harm(&inner);
    server.inspect(antefix_engine::Engine::clear_cache).await;
    aftermath(&app).await?;
    server.inspect(|e| e.store_cache(Duration::from_secs(5))).await;
    let pages = aftermath(&app).await?;
    server.close().await;
    Ok(pages)
}

async fn two_servers() -> Outcome {
    let dir = filled().await?;
    let (one, two) = (server_at(dir.path()), server_at(dir.path()));
    let pages = aftermath(&one.app()).await? + aftermath(&two.app()).await?;
    let (_, stats) = call(&two.app(), get("/v1/cache/stats")).await;
    let off = &stats["below"]["tiers"][0]["off"];
    expect(&format!("the second only reads: {stats}"), off.is_string())?;
    one.close().await;
    two.close().await;
    Ok(pages)
}

async fn no_folder() -> Outcome {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"no folder").unwrap();
    let server = server_at(&file);
    let pages = aftermath(&server.app()).await?;
    server.close().await;
    expect("the file is as it was", fs::read(&file).unwrap() == b"no folder")?;
    Ok(pages)
}

/// Blocks of another model under the names of this one's files.
async fn a_strangers_folder() -> Outcome {
    let dir = filled().await?;
    for file in files(dir.path(), "kv") {
        let mut bytes = fs::read(&file).unwrap();
        // The identity of a segment stands in its header, behind its number.
        bytes[24..56].fill(7);
        fs::write(&file, bytes).unwrap();
    }
    let (pages, _) = restarted(dir.path()).await?;
    Ok(pages)
}

pub(crate) async fn run(runner: &mut Runner) {
    let miss = "computed again, bit for bit";
    runner
        .fault(
            "(none: a restart)",
            "prompts come from disk, bit for bit",
            nothing_happened(),
        )
        .await;
    let flip = |bytes: &mut Vec<u8>| {
        for at in (700..bytes.len()).step_by(1000) {
            bytes[at] ^= 16;
        }
    };
    runner
        .fault(
            "block file: a bit flipped in every block",
            miss,
            damaged(flip, Some(false)),
        )
        .await;
    let head = |bytes: &mut Vec<u8>| bytes[20] ^= 1;
    runner
        .fault(
            "block file: a bit flipped in its header",
            miss,
            damaged(head, None),
        )
        .await;
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2 + 13);
    runner
        .fault("block file: torn in the middle", miss, damaged(cut, None))
        .await;
    let empty = |bytes: &mut Vec<u8>| bytes.clear();
    runner
        .fault("block file: empty", miss, damaged(empty, Some(false)))
        .await;
    let zeros = |bytes: &mut Vec<u8>| {
        let from = bytes.len() / 3;
        bytes[from..].fill(0);
    };
    runner
        .fault("block file: zeros from a third on", miss, damaged(zeros, None))
        .await;
    let moved = |bytes: &mut Vec<u8>| bytes.rotate_left(4096);
    runner
        .fault(
            "block file: blocks at other places",
            miss,
            damaged(moved, Some(false)),
        )
        .await;
    let grown = |bytes: &mut Vec<u8>| bytes.extend(std::iter::repeat_n(0xAB, 100_000));
    runner
        .fault(
            "block file: 100 kB of rubbish behind it",
            miss,
            damaged(grown, Some(true)),
        )
        .await;
    runner
        .fault(
            "index files: rubbish or gone",
            "read from the block files",
            no_index(),
        )
        .await;
    runner
        .fault("block files of a stranger", miss, a_strangers_folder())
        .await;
    let future = SystemTime::now() + Duration::from_hours(24 * 365 * 50);
    runner
        .fault("file times 50 years ahead", "no difference", times(future))
        .await;
    runner
        .fault(
            "file times of 1970",
            "no difference",
            times(SystemTime::UNIX_EPOCH),
        )
        .await;
    runner
        .fault(
            "the clock jumps a year",
            "what had an hour is forgotten",
            a_year_passes(),
        )
        .await;
    runner
        .fault(
            "cache folder deleted under the server",
            miss,
            beneath(|dir| fs::remove_dir_all(dir).unwrap()),
        )
        .await;
    runner
        .fault(
            "block files deleted under the server",
            miss,
            beneath(|dir| files(dir, "kv").iter().for_each(|f| fs::remove_file(f).unwrap())),
        )
        .await;
    runner
        .fault(
            "block files overwritten under the server",
            miss,
            beneath(|dir| {
                files(dir, "kv")
                    .iter()
                    .for_each(|f| fs::write(f, [9; 5000]).unwrap())
            }),
        )
        .await;
    runner
        .fault(
            "two servers on one folder",
            "the second reads only",
            two_servers(),
        )
        .await;
    runner
        .fault("the cache folder is a file", "no cache on disk", no_folder())
        .await;
}
