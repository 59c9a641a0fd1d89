//! `hf:owner/repo[/file.gguf]`: models on the hub, fetched with the `hf-hub` crate.

use std::path::{Path, PathBuf};

use hf_hub::{
    Cache,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};

use super::{Progress, StoreError};

/// A reference to a model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRef {
    /// `owner/repo`.
    pub repo: String,
    /// The file inside it; `None` leaves the choice to us.
    pub file: Option<String>,
}

impl HubRef {
    /// Reads `hf:owner/repo[/file.gguf]`; `None` if `text` does not start with `hf:`.
    ///
    /// # Errors
    /// [`StoreError::Reference`] if what follows is not of that form.
    pub fn parse(text: &str) -> Result<Option<Self>, StoreError> {
        let Some(rest) = text.strip_prefix("hf:") else {
            return Ok(None);
        };
        let wrong = || StoreError::Reference {
            text: text.to_owned(),
        };
        let words: Vec<&str> = rest.split('/').collect();
        // Words become parts of paths, so `..`, empty and odd ones are refused.
        let plain = |word: &&str| {
            !word.is_empty()
                && !word.starts_with('.')
                && word
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        };
        if words.len() < 2 || !words.iter().all(plain) {
            return Err(wrong());
        }
        let file = (words.len() > 2).then(|| words[2..].join("/"));
        let gguf = |file: &String| {
            Path::new(file)
                .extension()
                .is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
        };
        if file.as_ref().is_some_and(|file| !gguf(file)) {
            return Err(wrong());
        }
        Ok(Some(Self {
            repo: words[..2].join("/"),
            file,
        }))
    }

    fn error(&self, what: impl Into<String>, hint: impl Into<String>) -> StoreError {
        let file = self
            .file
            .as_ref()
            .map(|file| format!("/{file}"))
            .unwrap_or_default();
        StoreError::Hub {
            reference: format!("hf:{}{file}", self.repo),
            what: what.into(),
            hint: hint.into(),
        }
    }

    /// The folder of this repository in the hub's cache.
    pub(super) fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.repo.replace('/', "--")))
    }

    /// The file, or the folder of a model in several files, if it is in the cache.
    pub(super) fn cached(&self, cache: &Path) -> Option<PathBuf> {
        let repo = Cache::new(cache.to_owned()).model(self.repo.clone());
        if let Some(file) = &self.file {
            return repo.get(file);
        }
        let folder = repo
            .get("config.json")
            .and_then(|file| file.parent().map(Path::to_owned));
        let whole = |folder: &PathBuf| {
            folder.join("tokenizer.json").exists()
                && std::fs::read_dir(folder).is_ok_and(|mut all| {
                    all.any(|entry| {
                        entry.is_ok_and(|e| e.path().extension().is_some_and(|end| end == "safetensors"))
                    })
                })
        };
        folder.filter(whole)
    }

    /// Downloads what is missing.
    pub(super) fn pull(
        &self,
        cache: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf, StoreError> {
        let failed = |error: ApiError| {
            self.error(
                error.to_string(),
                "check the name and the network; models with a gate need a token (`hf auth login`)",
            )
        };
        let api = ApiBuilder::from_env()
            .with_cache_dir(cache.to_owned())
            .with_progress(false)
            .build()
            .map_err(failed)?;
        let repo = api.model(self.repo.clone());
        if let Some(file) = &self.file {
            return fetch(&repo, file, progress).map_err(failed);
        }
        let files: Vec<String> = repo
            .info()
            .map_err(failed)?
            .siblings
            .into_iter()
            .map(|f| f.rfilename)
            .collect();
        let wanted = self.choose(&files)?;
        let mut first = None;
        for file in &wanted {
            let path = fetch(&repo, file, progress).map_err(failed)?;
            first.get_or_insert(path);
        }
        let first = first.ok_or_else(|| self.error("holds no files", "name another repository"))?;
        let single = wanted.len() == 1;
        Ok(if single {
            first
        } else {
            first.parent().map_or_else(|| first.clone(), Path::to_owned)
        })
    }

    /// What to download out of `files`: the only GGUF file, or the files of a safetensors model.
    fn choose(&self, files: &[String]) -> Result<Vec<String>, StoreError> {
        let ends = |end: &'static str| files.iter().filter(move |file| file.ends_with(end));
        let gguf: Vec<&String> = ends(".gguf").collect();
        if let [only] = gguf[..] {
            return Ok(vec![only.clone()]);
        }
        if gguf.len() > 1 {
            let names: Vec<&str> = gguf.iter().map(|name| name.as_str()).collect();
            return Err(self.error(
                format!("holds {} GGUF files: {}", names.len(), names.join(", ")),
                format!("name one: `hf:{}/{}`", self.repo, names[0]),
            ));
        }
        let has = |name: &str| files.iter().any(|file| file == name);
        if !(has("config.json") && has("tokenizer.json") && ends(".safetensors").next().is_some()) {
            return Err(self.error(
                "holds neither a GGUF file nor config.json, tokenizer.json and safetensors",
                "name a repository with a `.gguf` file",
            ));
        }
        let small = [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
            "model.safetensors.index.json",
        ];
        let mut wanted: Vec<String> = small
            .into_iter()
            .filter(|name| has(name))
            .map(str::to_owned)
            .collect();
        wanted.extend(ends(".safetensors").filter(|file| !file.contains('/')).cloned());
        Ok(wanted)
    }
}

fn fetch(repo: &ApiRepo, file: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, ApiError> {
    repo.download_with_progress(
        file,
        Meter {
            report: progress,
            done: 0,
            total: 0,
        },
    )
}

/// Passes the crate's progress on as ours.
struct Meter<'a> {
    report: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
}

impl hf_hub::api::Progress for Meter<'_> {
    fn init(&mut self, size: usize, _: &str) {
        self.total = size as u64;
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.report)(Progress::Writing {
            done: self.done,
            total: self.total,
        });
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(text: &str) -> Result<Option<HubRef>, StoreError> {
        HubRef::parse(text)
    }

    #[test]
    fn references_are_read() {
        assert_eq!(hub("smollm2").unwrap(), None);
        let whole = hub("hf:me/tiny-GGUF").unwrap().unwrap();
        assert_eq!(
            whole,
            HubRef {
                repo: "me/tiny-GGUF".into(),
                file: None
            }
        );
        let file = hub("hf:me/tiny/q4/a.gguf").unwrap().unwrap();
        assert_eq!(
            file,
            HubRef {
                repo: "me/tiny".into(),
                file: Some("q4/a.gguf".into())
            }
        );
        for wrong in [
            "hf:",
            "hf:me",
            "hf:me/",
            "hf:../x",
            "hf:me/x/../../a.gguf",
            "hf:me/x/a.txt",
            "hf:me/x y",
        ] {
            let message = hub(wrong).unwrap_err().to_string();
            assert!(message.contains(wrong) && message.contains("hint: "), "{message}");
        }
    }

    #[test]
    fn the_only_gguf_is_chosen_and_several_are_listed() {
        let model = hub("hf:me/x").unwrap().unwrap();
        let files = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(
            model.choose(&files(&["README.md", "a.gguf"])).unwrap(),
            ["a.gguf"]
        );
        let message = model
            .choose(&files(&["a.gguf", "b.gguf"]))
            .unwrap_err()
            .to_string();
        assert!(message.contains("a.gguf, b.gguf") && message.contains("hint: name one: `hf:me/x/a.gguf`"));
        let folder = files(&[
            "x.bin",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "onnx/y.safetensors",
        ]);
        assert_eq!(
            model.choose(&folder).unwrap(),
            ["config.json", "tokenizer.json", "model.safetensors"]
        );
        assert!(model.choose(&files(&["README.md"])).is_err());
    }
}
