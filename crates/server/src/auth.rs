//! Who asks, and how much they may ask for.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::http::{HeaderMap, header};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::Deserialize;
use subtle::ConstantTimeEq;

use crate::error::ApiError;

/// One API key and its limits; what is absent is unlimited.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// For logs and metrics; never the key itself.
    pub name: String,
    /// The secret.
    #[serde(default)]
    pub key: Option<String>,
    /// Name of an environment variable that holds it.
    #[serde(default)]
    pub key_env: Option<String>,
    /// Keys of one group share cached prefixes; by default a key shares with nobody.
    #[serde(default)]
    pub group: Option<String>,
    /// Requests a minute.
    #[serde(default)]
    pub requests_per_minute: Option<NonZeroU32>,
    /// Prompt and answer tokens a minute; an answer counts with its `max_tokens`.
    #[serde(default)]
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Requests at a time.
    #[serde(default)]
    pub concurrent: Option<u32>,
    /// `max_tokens` at most.
    #[serde(default)]
    pub max_tokens: Option<usize>,
    /// `n` at most.
    #[serde(default)]
    pub n: Option<usize>,
    /// Bytes of a request's body at most, if less than the server's limit.
    #[serde(default)]
    pub body_bytes: Option<usize>,
    /// Whether its requests may read and change activations, where the server analyses; they may if nothing is said.
    #[serde(default)]
    pub analysis: Option<bool>,
    /// Whether it opens the admin listener's routes, too.
    #[serde(default)]
    pub admin: bool,
}

impl std::fmt::Debug for KeyConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyConfig")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A key that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum KeyError {
    #[error("key `{name}` has neither `key` nor `key_env`")]
    Missing { name: String },
    #[error("key `{name}` wants the environment variable `{variable}`, which is not set")]
    Unset { name: String, variable: String },
    #[error("key `{name}` is shorter than 16 bytes\nhint: make one with `openssl rand -hex 24`")]
    Short { name: String },
    #[error("two keys are called `{name}`")]
    Twice { name: String },
}

/// Somebody with a valid key.
pub(crate) struct Tenant {
    pub(crate) name: String,
    /// Turns are taken by this number.
    pub(crate) number: u64,
    /// What cached prefixes are shared under.
    group: String,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) n: Option<usize>,
    pub(crate) body_bytes: Option<usize>,
    pub(crate) analysis: bool,
    pub(crate) admin: bool,
    digest: [u8; 32],
    requests: Option<DefaultDirectRateLimiter>,
    tokens: Option<DefaultDirectRateLimiter>,
    concurrent: Option<u32>,
    running: AtomicU32,
}

/// One of a tenant's concurrent requests; ends when dropped.
pub(crate) struct Turn(Arc<Tenant>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Tenant {
    fn open(number: u64, config: &KeyConfig, digest: [u8; 32]) -> Self {
        let per_minute = |n: Option<NonZeroU32>| n.map(|n| RateLimiter::direct(Quota::per_minute(n)));
        Self {
            name: config.name.clone(),
            number,
            group: config
                .group
                .clone()
                .unwrap_or_else(|| format!("key {}", config.name)),
            max_tokens: config.max_tokens,
            n: config.n,
            body_bytes: config.body_bytes,
            analysis: config.analysis.unwrap_or(true),
            admin: config.admin,
            digest,
            requests: per_minute(config.requests_per_minute),
            tokens: per_minute(config.tokens_per_minute),
            concurrent: config.concurrent,
            running: AtomicU32::new(0),
        }
    }

    /// The salt of a request's cached prefixes.
    pub(crate) fn salt(&self, cache_salt: Option<&str>) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("antefix 2026 prefix cache salt");
        hasher.update(&(self.group.len() as u64).to_le_bytes());
        hasher.update(self.group.as_bytes());
        hasher.update(cache_salt.unwrap_or_default().as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    }

    /// Takes a turn of `tokens` tokens at most.
    pub(crate) fn enter(self: &Arc<Self>, tokens: usize) -> Result<Turn, ApiError> {
        let wait = |until: governor::NotUntil<_>| {
            let s = until
                .wait_time_from(DefaultClock::default().now())
                .as_secs_f64()
                .ceil() as u64;
            ApiError::too_many(format!("key `{}` has used its rate up", self.name), s.max(1))
        };
        if let Some(limiter) = &self.requests {
            limiter.check().map_err(wait)?;
        }
        if let (Some(limiter), Some(n)) = (
            &self.tokens,
            NonZeroU32::new(tokens.min(u32::MAX as usize) as u32),
        ) {
            match limiter.check_n(n) {
                Ok(Ok(())) => {}
                Ok(Err(until)) => return Err(wait(until)),
                Err(_) => {
                    return Err(ApiError::invalid(format!(
                        "the request may take {tokens} tokens, more than key `{}` may have in a minute",
                        self.name
                    )));
                }
            }
        }
        let before = self.running.fetch_add(1, Ordering::Relaxed);
        let turn = Turn(Arc::clone(self));
        match self.concurrent {
            Some(most) if before >= most => Err(ApiError::too_many(
                format!("key `{}` already has {before} requests running", self.name),
                1,
            )),
            _ => Ok(turn),
        }
    }
}

/// Everybody who may ask.
pub(crate) struct Tenants {
    /// Without keys everybody is this one.
    anybody: Option<Arc<Tenant>>,
    tenants: Vec<Arc<Tenant>>,
}

impl Tenants {
    /// Without keys everybody is let in.
    pub(crate) fn new(keys: &[KeyConfig]) -> Result<Self, KeyError> {
        let mut tenants: Vec<Arc<Tenant>> = Vec::new();
        for config in keys {
            let name = config.name.clone();
            let secret = match (&config.key, &config.key_env) {
                (Some(key), _) => key.clone(),
                (None, Some(variable)) => std::env::var(variable).map_err(|_| KeyError::Unset {
                    name: name.clone(),
                    variable: variable.clone(),
                })?,
                (None, None) => return Err(KeyError::Missing { name }),
            };
            if secret.len() < 16 {
                return Err(KeyError::Short { name });
            }
            if tenants.iter().any(|t| t.name == name) {
                return Err(KeyError::Twice { name });
            }
            let digest = *blake3::hash(secret.as_bytes()).as_bytes();
            tenants.push(Arc::new(Tenant::open(tenants.len() as u64 + 1, config, digest)));
        }
        let anybody = tenants.is_empty().then(|| {
            let config = KeyConfig {
                name: "anybody".into(),
                ..KeyConfig::default()
            };
            Arc::new(Tenant::open(0, &config, [0; 32]))
        });
        Ok(Self { anybody, tenants })
    }

    /// Whether only keys are let in.
    pub(crate) fn need_keys(&self) -> bool {
        self.anybody.is_none()
    }

    /// Whose key the request bears: digests are compared, in constant time and with all of them.
    pub(crate) fn find(&self, headers: &HeaderMap) -> Result<Arc<Tenant>, ApiError> {
        if let Some(anybody) = &self.anybody {
            return Ok(Arc::clone(anybody));
        }
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, key)| key.trim());
        let key = bearer.or_else(|| headers.get("x-api-key").and_then(|v| v.to_str().ok()));
        let digest = *blake3::hash(key.unwrap_or_default().as_bytes()).as_bytes();
        let mut found = None;
        for tenant in &self.tenants {
            if bool::from(tenant.digest.ct_eq(&digest)) {
                found = Some(tenant);
            }
        }
        found.cloned().ok_or_else(ApiError::unauthorised)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, secret: &str) -> KeyConfig {
        KeyConfig {
            name: name.into(),
            key: Some(secret.into()),
            ..KeyConfig::default()
        }
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn only_whole_keys_open() {
        let tenants = Tenants::new(&[key("a", "0123456789abcdef"), key("b", "fedcba9876543210")]).unwrap();
        let name = |h: &HeaderMap| {
            tenants
                .find(h)
                .map(|t| t.name.clone())
                .map_err(|e| e.status.as_u16())
        };
        assert_eq!(
            name(&headers("authorization", "Bearer fedcba9876543210")),
            Ok("b".into())
        );
        assert_eq!(name(&headers("x-api-key", "0123456789abcdef")), Ok("a".into()));
        for bad in [
            "Bearer 0123456789abcde",
            "Bearer ",
            "Basic 0123456789abcdef",
            "0123456789abcdef",
        ] {
            assert_eq!(name(&headers("authorization", bad)), Err(401), "{bad}");
        }
        assert_eq!(name(&HeaderMap::new()), Err(401));
    }

    #[test]
    fn salts_differ_between_keys_and_agree_in_a_group() {
        let with_group = |name: &str, secret: &str| KeyConfig {
            group: Some("team".into()),
            ..key(name, secret)
        };
        let t = Tenants::new(&[
            key("a", "0123456789abcdef"),
            key("b", "fedcba9876543210"),
            with_group("c", "cccccccccccccccc"),
            with_group("d", "dddddddddddddddd"),
        ])
        .unwrap();
        let salt = |i: usize, s: Option<&str>| t.tenants[i].salt(s);
        assert_ne!(salt(0, None), salt(1, None));
        assert_eq!(salt(2, None), salt(3, None));
        assert_ne!(salt(2, None), salt(2, Some("x")));
        assert_eq!(salt(2, Some("x")), salt(3, Some("x")));
    }

    #[test]
    fn limits_hold() {
        let config = KeyConfig {
            concurrent: Some(1),
            tokens_per_minute: NonZeroU32::new(100),
            ..key("a", "0123456789abcdef")
        };
        let t = Tenants::new(&[config]).unwrap();
        let tenant = &t.tenants[0];
        let first = tenant.enter(40).unwrap();
        assert_eq!(tenant.enter(40).err().map(|e| e.status.as_u16()), Some(429));
        drop(first);
        // 80 of the 100 are gone.
        let e = tenant.enter(40).err().unwrap();
        assert_eq!(e.status.as_u16(), 429);
        assert!(e.retry_after_s.is_some_and(|s| (1..=60).contains(&s)));
        assert_eq!(tenant.enter(101).err().map(|e| e.status.as_u16()), Some(400));
        assert!(tenant.enter(10).is_ok());
    }

    #[test]
    fn senseless_keys_are_named() {
        let none = KeyConfig {
            key: None,
            ..key("a", "")
        };
        assert_eq!(
            Tenants::new(&[none]).err(),
            Some(KeyError::Missing { name: "a".into() })
        );
        assert_eq!(
            Tenants::new(&[key("a", "short")]).err(),
            Some(KeyError::Short { name: "a".into() })
        );
        let twice = [key("a", "0123456789abcdef"), key("a", "fedcba9876543210")];
        assert_eq!(
            Tenants::new(&twice).err(),
            Some(KeyError::Twice { name: "a".into() })
        );
    }
}
