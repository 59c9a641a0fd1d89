//! `antefix serve`: the HTTP server. Settings come from flags, then the environment, then a TOML file, then defaults.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use antefix_attention::method::{Profiles, RawMethods, Trust};
use antefix_engine::{Beside, Budget, Options};
use antefix_kv::Pool;
use antefix_server::{
    Analysis, CacheConfig, ClientLimits, Config, DiskConfig, KeyConfig, Limits, Offer, RememberLimits,
    RemoteConfig, Server,
};
use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::method::Profile;
use crate::model::{Loaded, ModelArgs, PrecisionArg, RunArgs, chunk_folder};

/// Tokens of a sequence at most, if nobody says otherwise.
const DEFAULT_CONTEXT: usize = 32_768;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// An alias (see `antefix models`), a `.gguf` file, a folder, or hf:OWNER/REPO[/FILE]
    #[arg(short, long, env = "ANTEFIX_MODEL")]
    model: Option<String>,
    /// Address to listen on; other than a loopback address it needs API keys
    #[arg(long, env = "ANTEFIX_HOST")]
    host: Option<IpAddr>,
    /// Port; 0 takes a free one
    #[arg(long, env = "ANTEFIX_PORT")]
    port: Option<u16>,
    /// Address for administration: clearing the cache, metrics; without it there is none
    #[arg(long, env = "ANTEFIX_ADMIN")]
    admin: Option<SocketAddr>,
    /// TOML file with the same settings and `[[keys]]`
    #[arg(long, env = "ANTEFIX_CONFIG")]
    config: Option<PathBuf>,
    /// An API key that may do everything; more, with limits, in the TOML file
    #[arg(long, env = "ANTEFIX_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Name under which the model answers; repeatable; default: the model's alias or file name
    #[arg(long = "served-model-name")]
    names: Vec<String>,
    /// Tokens of prompt and answer at most; default: what the model was trained for, up to 32,768
    #[arg(long)]
    ctx: Option<usize>,
    /// MiB of keys and values, cached prefixes included; default: half of the free memory
    #[arg(long)]
    kv_mib: Option<usize>,
    /// Folder for cached prefixes: they survive a restart, and what does not fit into memory any more
    #[arg(long, env = "ANTEFIX_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// MiB that the folder may take
    #[arg(long, env = "ANTEFIX_CACHE_DISK_MIB")]
    cache_disk_mib: Option<u64>,
    /// Store on another machine for cached prefixes, asked after the folder: fs:///folder, redis://host:6379, s3://bucket/prefix
    #[arg(
        long,
        value_name = "URI",
        env = "ANTEFIX_CACHE_REMOTE",
        hide_env_values = true
    )]
    cache_remote: Option<String>,
    /// MiB of memory that cached prefixes may hold; default: whatever running requests leave of --kv-mib
    #[arg(long)]
    cache_mib: Option<usize>,
    /// Seconds after which an unused prefix is forgotten; default: when its memory is needed
    #[arg(long)]
    cache_ttl_s: Option<u64>,
    /// Requests that may wait; more get 429
    #[arg(long)]
    queue: Option<usize>,
    /// How much longer than without it a step may take for the sake of somebody's prompt: less = steadier tokens, more = faster
    /// prompts
    #[arg(long)]
    max_inter_token_factor: Option<f64>,
    /// Rows of prompts in a step beside decoding sequences, instead of --max-inter-token-factor
    #[arg(long)]
    prompt_rows: Option<usize>,
    /// Jinja file to use instead of the model's chat template
    #[arg(long)]
    chat_template: Option<PathBuf>,
    /// Methods by length of the prompt, where a request chooses none: a TOML file such as `antefix tune` writes
    #[arg(long, value_name = "FILE", env = "ANTEFIX_PROFILE")]
    profile: Option<PathBuf>,
    /// Let requests read and change activations (docs/hooks.md): traces tell what prompts said
    #[arg(long)]
    analysis: bool,
    /// Seconds that a request may take from its arrival to the end of its answer; requests can only shorten it
    #[arg(long, env = "ANTEFIX_REQUEST_TIMEOUT")]
    request_timeout: Option<f64>,
    /// Address of an OpenTelemetry collector (OTLP over HTTP) that takes a span of every request: http://HOST:4318
    #[cfg_attr(feature = "otlp", arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT"))]
    #[cfg_attr(not(feature = "otlp"), arg(long))]
    otlp_endpoint: Option<String>,
    /// Refuse fields that are not known
    #[arg(long)]
    strict: bool,
    /// Seconds that running requests have to end after SIGTERM
    #[arg(long)]
    drain_s: Option<u64>,
    /// Threads; default: all cores
    #[arg(short = 't', long)]
    threads: Option<usize>,
    /// Weights as in the file with int8 activations, or everything in f32
    #[arg(long, value_enum, default_value = "fast")]
    precision: PrecisionArg,
    /// Print the settings that would hold, and end
    #[arg(long)]
    print_config: bool,
}

/// All settings; what the file leaves out is a default.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    model: String,
    host: IpAddr,
    port: u16,
    admin: Option<SocketAddr>,
    hosts: Vec<String>,
    names: Vec<String>,
    ctx: Option<usize>,
    kv_mib: Option<usize>,
    cache_dir: Option<PathBuf>,
    cache_disk_mib: u64,
    cache_disk_ttl_h: u64,
    cache_mib: Option<usize>,
    cache_ttl_s: Option<u64>,
    queue: usize,
    max_inter_token_factor: f64,
    prompt_rows: Option<usize>,
    chat_template: Option<PathBuf>,
    analysis: bool,
    request_timeout: Option<f64>,
    otlp_endpoint: Option<String>,
    strict: bool,
    drain_s: u64,
    body_mib: usize,
    body_timeout_s: u64,
    connections: usize,
    head_timeout_s: u64,
    stalled_s: u64,
    remember_mib: usize,
    threads: Option<usize>,
    /// A file of methods by length of the prompt: what holds for requests that say nothing about an axis.
    profile: Option<PathBuf>,
    /// `[methods]`: what holds where neither a request nor the profile says anything.
    methods: RawMethods,
    cache_remote: Option<RemoteConfig>,
    #[serde(skip_serializing)]
    keys: Vec<KeyConfig>,
}

impl Default for Settings {
    fn default() -> Self {
        let clients = ClientLimits::default();
        Self {
            model: antefix_models::store::DEFAULT.to_string(),
            host: IpAddr::from([127, 0, 0, 1]),
            port: 8080,
            admin: None,
            hosts: Vec::new(),
            names: Vec::new(),
            ctx: None,
            kv_mib: None,
            cache_dir: None,
            cache_disk_mib: 4096,
            cache_disk_ttl_h: 24,
            cache_mib: None,
            cache_ttl_s: None,
            cache_remote: None,
            queue: 256,
            max_inter_token_factor: 3.0,
            prompt_rows: None,
            chat_template: None,
            analysis: false,
            request_timeout: None,
            otlp_endpoint: None,
            strict: false,
            drain_s: 30,
            body_mib: 32,
            body_timeout_s: 30,
            connections: clients.connections,
            head_timeout_s: clients.head.as_secs(),
            stalled_s: clients.stalled.as_secs(),
            remember_mib: RememberLimits::default().bytes >> 20,
            threads: None,
            profile: None,
            methods: RawMethods::default(),
            keys: Vec::new(),
        }
    }
}

impl Settings {
    fn new(args: &Args) -> Result<Self, Failure> {
        let mut s: Self = match &args.config {
            None => Self::default(),
            Some(path) => read(path)?,
        };
        fn put<T: Clone>(to: &mut T, from: Option<&T>) {
            if let Some(value) = from {
                to.clone_from(value);
            }
        }
        put(&mut s.model, args.model.as_ref());
        put(&mut s.host, args.host.as_ref());
        put(&mut s.port, args.port.as_ref());
        put(&mut s.queue, args.queue.as_ref());
        put(
            &mut s.max_inter_token_factor,
            args.max_inter_token_factor.as_ref(),
        );
        s.prompt_rows = args.prompt_rows.or(s.prompt_rows);
        put(&mut s.drain_s, args.drain_s.as_ref());
        s.admin = args.admin.or(s.admin);
        s.ctx = args.ctx.or(s.ctx);
        s.kv_mib = args.kv_mib.or(s.kv_mib);
        s.cache_dir = args.cache_dir.clone().or(s.cache_dir);
        put(&mut s.cache_disk_mib, args.cache_disk_mib.as_ref());
        if let Some(uri) = &args.cache_remote {
            // The other settings of the file's table stay.
            match &mut s.cache_remote {
                Some(remote) => remote.uri.clone_from(uri),
                None => s.cache_remote = Some(RemoteConfig::at(uri)),
            }
        }
        s.cache_mib = args.cache_mib.or(s.cache_mib);
        s.cache_ttl_s = args.cache_ttl_s.or(s.cache_ttl_s);
        s.threads = args.threads.or(s.threads);
        s.chat_template = args.chat_template.clone().or(s.chat_template);
        s.profile = args.profile.clone().or(s.profile);
        s.analysis |= args.analysis;
        s.request_timeout = args.request_timeout.or(s.request_timeout);
        s.otlp_endpoint = args.otlp_endpoint.clone().or(s.otlp_endpoint);
        s.strict |= args.strict;
        if !args.names.is_empty() {
            s.names.clone_from(&args.names);
        }
        if let Some(key) = &args.api_key {
            s.keys.push(KeyConfig {
                name: "default".into(),
                key: Some(key.clone()),
                ..KeyConfig::default()
            });
        }
        if s.names.is_empty() {
            s.names.push(match Path::new(&s.model).file_stem() {
                Some(stem) if Path::new(&s.model).exists() => stem.to_string_lossy().into_owned(),
                _ => s.model.clone(),
            });
        }
        let factor = s.max_inter_token_factor;
        if s.queue == 0 || s.prompt_rows == Some(0) || factor.is_nan() || factor < 1.0 {
            return Err(Failure::Input(anyhow!(
                "`queue`, `prompt_rows` and `max_inter_token_factor` must be at least 1"
            )));
        }
        if let Some(Err(why)) = s.request_timeout.map(seconds) {
            return Err(Failure::Input(why));
        }
        if !s.host.is_loopback() && s.keys.is_empty() {
            return Err(Failure::Input(anyhow!(
                "{} is reachable from other machines, but there is no API key\nhint: set ANTEFIX_API_KEY, write `[[keys]]` into the \
                 file of --config, or listen on 127.0.0.1",
                s.host
            )));
        }
        let locked = s.keys.iter().any(|key| key.admin);
        if s.admin.is_some_and(|admin| !admin.ip().is_loopback()) && !locked {
            return Err(Failure::Input(anyhow!(
                "the admin address is reachable from other machines, but no key has `admin = true`"
            )));
        }
        Ok(s)
    }
}

/// A time limit of at least a millisecond.
fn seconds(s: f64) -> anyhow::Result<Duration> {
    let limit = Duration::try_from_secs_f64(s).ok();
    limit.filter(|d| d.as_millis() > 0).ok_or_else(|| {
        anyhow!("`request_timeout` is {s}, it must be a number of seconds, at least 0.001\nhint: leave it out for no limit")
    })
}

fn read(path: &Path) -> Result<Settings, Failure> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {}", path.display()))
        .map_err(Failure::Input)?;
    toml::from_str(&text)
        .with_context(|| format!("{} is not a valid configuration", path.display()))
        .map_err(Failure::Input)
}

/// Half of what the machine, or the control group we run in, has left.
fn spare_memory() -> usize {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let machine = system.available_memory();
    let group = system
        .cgroup_limits()
        .map_or(u64::MAX, |limits| limits.free_memory);
    usize::try_from(machine.min(group) / 2).unwrap_or(usize::MAX)
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let settings = Settings::new(&args)?;
    // What is wrong with it is wrong for requests of others, too.
    let read = |file: &PathBuf| Profile::read(file, Trust::Remote);
    let profile = settings
        .profile
        .as_ref()
        .map(read)
        .transpose()?
        .unwrap_or_default();
    if args.print_config {
        let text = toml::to_string_pretty(&settings).map_err(Failure::other)?;
        super::line(text.trim_end())?;
        for band in profile.bands.all() {
            super::line(format!("# {band}"))?;
        }
        for key in &settings.keys {
            super::line(format!("# key `{}`", key.name))?;
        }
        return Ok(());
    }
    let _telemetry = crate::telemetry::start(settings.otlp_endpoint.as_deref())?;

    let which = ModelArgs {
        model: settings.model.clone(),
    };
    let how = RunArgs {
        threads: settings.threads,
        precision: args.precision,
    };
    let loaded = Loaded::new(&which, &how)?;
    profile.fit(&loaded.model, &settings.model, Trust::Remote)?;
    let template = match &settings.chat_template {
        Some(path) => Some(loaded.template_from(path)?),
        None => loaded.template()?,
    };
    let trained = loaded.model.spec().context;
    let context = settings.ctx.unwrap_or(DEFAULT_CONTEXT).min(trained);
    let least = Pool::new(loaded.model.kv_shape(), 0).bytes_for(context);
    let kv_bytes = settings
        .kv_mib
        .map_or_else(|| spare_memory().max(least), |mib| mib << 20);
    if kv_bytes < least {
        return Err(Failure::Input(anyhow!(
            "one sequence of {context} tokens takes {} MiB of keys and values, `kv_mib` allows {}\nhint: lower --ctx or raise --kv-mib",
            least.div_ceil(1 << 20),
            kv_bytes >> 20
        )));
    }
    let folder = chunk_folder()?;
    let chunks = match folder.is_dir() {
        true => Some((
            antefix_engine::identity(&loaded.model)
                .map_err(Failure::other)?
                .fingerprint(),
            folder,
        )),
        false => None,
    };
    let config = Config {
        names: settings.names.clone(),
        engine: Options {
            kv_bytes,
            context,
            budget: Budget {
                beside_decode: settings
                    .prompt_rows
                    .map_or(Beside::Factor(settings.max_inter_token_factor), Beside::Rows),
                ..Budget::default()
            },
        },
        chunks,
        limits: Limits {
            queue: settings.queue,
        },
        keys: settings.keys,
        offer: Offer {
            methods: antefix_papers::ALL,
            always: antefix_papers::ALWAYS,
            // Requests name profiles, never files of this machine.
            profiles: Profiles::named_in(crate::method::profiles()?.folders),
            defaults: settings.methods,
            bands: profile.bands,
        },
        analysis: settings.analysis.then(Analysis::default),
        request_timeout: settings
            .request_timeout
            .map(seconds)
            .transpose()
            .map_err(Failure::Input)?,
        strict: settings.strict,
        body_bytes: settings.body_mib << 20,
        body_timeout: Duration::from_secs(settings.body_timeout_s),
        clients: ClientLimits {
            connections: settings.connections.max(1),
            head: Duration::from_secs(settings.head_timeout_s),
            stalled: Duration::from_secs(settings.stalled_s),
        },
        remember: RememberLimits {
            bytes: settings.remember_mib << 20,
            ..RememberLimits::default()
        },
        hosts: settings.hosts,
        drain: Duration::from_secs(settings.drain_s),
        cache: CacheConfig {
            bytes: settings.cache_mib.map(|mib| mib << 20),
            ttl: settings.cache_ttl_s.map(Duration::from_secs),
            remote: settings.cache_remote,
            disk: settings.cache_dir.map(|dir| DiskConfig {
                dir,
                bytes: settings.cache_disk_mib << 20,
                ttl: (settings.cache_disk_ttl_h > 0)
                    .then(|| Duration::from_hours(settings.cache_disk_ttl_h.min(1_000_000))),
            }),
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let server =
            Server::start(&loaded.model, &loaded.tokenizer, template, config).map_err(Failure::input)?;
        let address = SocketAddr::new(settings.host, settings.port);
        let listener = listen(address).await?;
        let admin = match settings.admin {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        eprintln!(
            "serving {} on http://{} (context {context}, {} MiB of keys and values)",
            settings.names.join(", "),
            listener.local_addr()?,
            kv_bytes >> 20
        );
        if let Some(admin) = &admin {
            eprintln!("administration on http://{}", admin.local_addr()?);
        }
        server.serve(listener, admin, stop()).await;
        Ok(())
    })
}

async fn listen(address: SocketAddr) -> Result<tokio::net::TcpListener, Failure> {
    tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}\nhint: choose another port"))
        .map_err(Failure::Input)
}

/// Resolves on SIGTERM or ctrl-C.
async fn stop() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            },
            Err(_) => drop(interrupt.await),
        }
    }
    #[cfg(not(unix))]
    drop(interrupt.await);
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn settings(line: &[&str]) -> Result<Settings, Failure> {
        let line = [&["serve"], line].concat();
        Settings::new(&Line::parse_from(line).args)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let path = std::env::temp_dir().join(format!("antefix-serve-{}.toml", std::process::id()));
        std::fs::write(&path, "port = 9000\nqueue = 7\n").unwrap();
        let s = settings(&["--config", path.to_str().unwrap(), "--port", "9001"]).unwrap();
        assert_eq!((s.port, s.queue, s.drain_s), (9001, 7, 30));
        std::fs::write(&path, "prot = 9000\n").unwrap();
        assert_eq!(
            settings(&["--config", path.to_str().unwrap()])
                .err()
                .unwrap()
                .code(),
            2
        );
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_public_address_needs_a_key() {
        assert!(settings(&["--host", "127.0.0.1"]).is_ok());
        assert_eq!(settings(&["--host", "0.0.0.0"]).err().unwrap().code(), 2);
        assert!(settings(&["--host", "0.0.0.0", "--api-key", "0123456789abcdef"]).is_ok());
    }
}
