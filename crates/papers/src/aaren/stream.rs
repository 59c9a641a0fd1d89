//! Streaming (3.7): one event in, one prediction out, a state of constant size that can be saved.

use serde::Deserialize;
use serde_json::{Value, json};

use safetensors::Dtype;

use super::config::{Mixer, Scale, Task, sinusoid, time_features};
use super::file::{FileError, Raw, pack};
use super::mixture::Mixture;
use super::model::{LayerState, Model, Scratch};
use super::scan::Prefix;

/// The first text of a state's file.
pub const FORMAT: &str = "antefix aaren state 1";

/// Normalised values beyond this are a mistake, not data.
const FAR: f32 = 1e6;

/// Why an event was not taken. The state is as it was before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// No JSON object with the fields of this task.
    #[error("{0}\nhint: {1}")]
    Json(String, &'static str),
    /// A list of the wrong length.
    #[error("`{field}` has {got} values, this model reads {want}")]
    Size {
        /// Which list.
        field: &'static str,
        /// Its length.
        got: usize,
        /// The model's.
        want: usize,
    },
    /// A number that cannot be.
    #[error("`{field}` is {got}, but must be {want}")]
    Number {
        /// Which.
        field: &'static str,
        /// What it is.
        got: String,
        /// What it may be.
        want: String,
    },
    /// The weights overflow on this event.
    #[error("the model's answer to it is no number")]
    Overflow,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Values {
    x: Vec<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Happened {
    dt: f64,
    mark: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Observed {
    state: Vec<f64>,
    #[serde(rename = "return")]
    to_go: f64,
    action: Option<Vec<f64>>,
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str, hint: &'static str) -> Result<T, EventError> {
    serde_json::from_str(text).map_err(|e| EventError::Json(e.to_string(), hint))
}

/// Values of a list of the right length as f32, normalised if there is something to normalise by.
fn list(
    field: &'static str,
    values: &[f64],
    want: usize,
    scale: Option<&Scale>,
) -> Result<Vec<f32>, EventError> {
    if values.len() != want {
        return Err(EventError::Size {
            field,
            got: values.len(),
            want,
        });
    }
    let mut out = Vec::with_capacity(want);
    for (i, x) in values.iter().enumerate() {
        let normal = scale.map_or(*x, |s| (x - s.mean[i]) / s.std[i]) as f32;
        if normal.is_nan() || normal.abs() > FAR {
            return Err(EventError::Number {
                field,
                got: format!("{x} at place {i}"),
                want: "within a million standard deviations of the training data".into(),
            });
        }
        out.push(normal);
    }
    Ok(out)
}

/// Where a stream stands.
#[derive(Debug, Clone)]
pub struct State {
    layers: Vec<LayerState>,
    /// Events taken.
    seen: u64,
    /// Sum of the times between events.
    time: f64,
    /// Classification: sum of the outputs, `[d]`.
    sum: Vec<f64>,
    /// What was said of the next event: heads of the mixture and of the mark, or the action.
    last: Vec<f32>,
}

impl State {
    /// Bytes held, all layers and what the head needs.
    pub fn bytes(&self) -> usize {
        self.layer_bytes().sum::<usize>()
            + size_of_val(&self.sum[..])
            + size_of_val(&self.last[..])
            + size_of::<u64>()
            + size_of::<f64>()
    }

    /// Bytes of each layer's state.
    pub fn layer_bytes(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().map(LayerState::bytes)
    }

    /// States of the layers, from the input up.
    pub fn layers(&self) -> &[LayerState] {
        &self.layers
    }

    /// Events taken.
    pub fn seen(&self) -> u64 {
        self.seen
    }
}

/// A model that follows one stream.
pub struct Session<'m> {
    model: &'m Model,
    state: State,
    scratch: Scratch,
    tokens: Vec<f32>,
    head: Vec<f32>,
    places: Vec<f32>,
}

impl<'m> Session<'m> {
    /// At the beginning.
    pub fn new(model: &'m Model) -> Self {
        let (sum, last) = sizes(model);
        let state = State {
            layers: model.start(),
            seen: 0,
            time: 0.0,
            sum: vec![0.0; sum],
            last: vec![0.0; last],
        };
        Self::resume(model, state)
    }

    /// Where a state stands.
    pub fn resume(model: &'m Model, state: State) -> Self {
        Self {
            model,
            state,
            scratch: Scratch::default(),
            tokens: Vec::new(),
            head: Vec::new(),
            places: vec![0.0; model.config().width],
        }
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes one event in, a JSON object, and says what it means or what comes next:
    ///
    /// | task | event | prediction |
    /// |---|---|---|
    /// | classify | `{"x": [..]}` | `class`, `probabilities` |
    /// | forecast | `{"x": [..]}` | `next`: `horizon` lists |
    /// | events | `{"dt": 0.7, "mark": 2}` | `median`, `mean`, `marks`, and `nll` of this event under the prediction before it |
    /// | control | `{"state": [..], "return": 9.5, "action": [..]}` | `action`; the event's is what was done in the step before, if it was another than predicted |
    ///
    /// # Errors
    /// See [`EventError`]; the state is then what it was.
    pub fn feed(&mut self, line: &str) -> Result<Value, EventError> {
        // The constant state is copied, so that an event that fails has not happened. The twin's cache is not.
        let constant = self.model.config().mixer == Mixer::Aaren;
        let before = constant.then(|| self.state.clone());
        let said = self.answer(line);
        if let (Err(_), Some(before)) = (&said, before) {
            self.state = before;
        }
        said
    }

    fn answer(&mut self, line: &str) -> Result<Value, EventError> {
        match &self.model.config().task {
            Task::Classify {
                channels,
                classes,
                scale,
            } => {
                let event: Values = parse(line, "an event of this model is {\"x\": [numbers]}")?;
                let x = list("x", &event.x, *channels, Some(scale))?;
                self.value_token(&x)?;
                let sum = self.state.sum.iter_mut().zip(&self.tokens);
                sum.for_each(|(s, x)| *s += f64::from(*x));
                self.state.seen += 1;
                let n = self.state.seen as f64;
                let mean: Vec<f32> = self.state.sum.iter().map(|s| (s / n) as f32).collect();
                self.head("head", &mean)?;
                let probabilities = softmax(&self.head);
                let best = argmax(&probabilities);
                Ok(json!({"n": self.state.seen, "class": classes[best], "probabilities": probabilities}))
            }
            Task::Forecast { channels, scale, .. } => {
                let event: Values = parse(line, "an event of this model is {\"x\": [numbers]}")?;
                let x = list("x", &event.x, *channels, Some(scale))?;
                self.value_token(&x)?;
                self.state.seen += 1;
                self.model.map("head", &self.tokens, &mut self.head);
                finite(&self.head)?;
                let next = scale.undo(&self.head);
                let next: Vec<&[f32]> = next.chunks_exact(*channels).collect();
                Ok(json!({"n": self.state.seen, "next": next}))
            }
            Task::Events {
                marks,
                components,
                log_mean,
                log_std,
            } => {
                let event: Happened = parse(
                    line,
                    "an event of this model is {\"dt\": seconds, \"mark\": index}",
                )?;
                self.event(&event, *marks, *components, *log_mean, *log_std)
            }
            Task::Control {
                states,
                actions,
                scale,
                return_scale,
            } => {
                let event: Observed = parse(
                    line,
                    "an event of this model is {\"state\": [numbers], \"return\": number, \"action\": [numbers, optional]}",
                )?;
                let seen = list("state", &event.state, *states, Some(scale))?;
                let to_go = list("return", &[event.to_go / return_scale], 1, None)?;
                let action = event
                    .action
                    .map(|a| list("action", &a, *actions, None))
                    .transpose()?;
                self.decide(&seen, &to_go, action)
            }
        }
    }

    /// Runs `self.tokens` through the layers.
    fn forward(&mut self) -> Result<(), EventError> {
        self.model
            .forward(&mut self.tokens, &mut self.state.layers, &mut self.scratch);
        finite(&self.tokens)
    }

    /// The linear map `name` of `x`, into `self.head`.
    fn head(&mut self, name: &str, x: &[f32]) -> Result<(), EventError> {
        self.model.map(name, x, &mut self.head);
        finite(&self.head)
    }

    fn add_place(&mut self, token: usize, t: f64) {
        let d = self.model.config().width;
        sinusoid(t, d, &mut self.places);
        let token = &mut self.tokens[token * d..][..d];
        token.iter_mut().zip(&self.places).for_each(|(x, p)| *x += p);
    }

    fn value_token(&mut self, x: &[f32]) -> Result<(), EventError> {
        self.model.map("embed", x, &mut self.tokens);
        self.add_place(0, self.state.seen as f64);
        self.forward()
    }

    fn event(
        &mut self,
        event: &Happened,
        marks: usize,
        components: usize,
        log_mean: f64,
        log_std: f64,
    ) -> Result<Value, EventError> {
        let number = |field: &'static str, got: String, want: &str| EventError::Number {
            field,
            got,
            want: want.into(),
        };
        if !(event.dt > 0.0 && event.dt < 1e30) {
            return Err(number("dt", event.dt.to_string(), "above 0 and below 1e30"));
        }
        let mark = match (event.mark, marks) {
            (None, 0) => None,
            (Some(m), 1..) if m < marks => Some(m),
            (got, _) => {
                let got = got.map_or("missing".into(), |m| m.to_string());
                let want = match marks {
                    0 => "left out: this model knows no marks".into(),
                    n => format!("0 to {}", n - 1),
                };
                return Err(number("mark", got, &want));
            }
        };
        let scored = (self.state.seen > 0).then(|| {
            let (mixture, logits) = self.state.last.split_at(3 * components);
            let time = Mixture::new(mixture, log_mean, log_std).nll(event.dt);
            time - mark.map_or(0.0, |m| f64::from(softmax(logits)[m]).max(1e-30).ln())
        });
        let features = time_features(event.dt, log_mean, log_std);
        self.model.map("embed", &features, &mut self.tokens);
        if let Some(mark) = mark {
            let row = self.model.mark(mark);
            self.tokens.iter_mut().zip(row).for_each(|(x, e)| *x += e);
        }
        let time = self.state.time + event.dt;
        self.add_place(0, time / log_mean.exp());
        self.forward()?;
        self.state.time = time;
        self.state.seen += 1;
        self.model.map("mixture", &self.tokens, &mut self.head);
        finite(&self.head)?;
        self.state.last[..3 * components].copy_from_slice(&self.head);
        let mixture = Mixture::new(&self.head, log_mean, log_std);
        self.model.map("mark", &self.tokens, &mut self.head);
        finite(&self.head)?;
        self.state.last[3 * components..].copy_from_slice(&self.head);
        let mut said = json!({"n": self.state.seen, "median": mixture.quantile(0.5), "mean": mixture.mean()});
        if marks > 0 {
            said["marks"] = json!(softmax(&self.head));
        }
        if let Some(nll) = scored {
            said["nll"] = json!(nll);
        }
        Ok(said)
    }

    fn decide(&mut self, seen: &[f32], to_go: &[f32], action: Option<Vec<f32>>) -> Result<Value, EventError> {
        if let (Some(_), 0) = (&action, self.state.seen) {
            return Err(EventError::Number {
                field: "action",
                got: "given".into(),
                want: "left out of the first event: there was no step before it".into(),
            });
        }
        let d = self.model.config().width;
        let t = self.state.seen as f64;
        let mut tokens = Vec::with_capacity(3 * d);
        let before = self.state.seen > 0;
        if before {
            let action = action.as_deref().unwrap_or(&self.state.last);
            self.model.map("embed_action", action, &mut self.head);
            tokens.extend_from_slice(&self.head);
        }
        for (name, x) in [("embed_return", to_go), ("embed_state", seen)] {
            self.model.map(name, x, &mut self.head);
            tokens.extend_from_slice(&self.head);
        }
        self.tokens = tokens;
        let first = usize::from(before);
        if before {
            self.add_place(0, t - 1.0);
        }
        self.add_place(first, t);
        self.add_place(first + 1, t);
        self.model.embedded(&mut self.tokens);
        self.forward()?;
        let at = self.tokens.len() - d;
        self.model.map("head", &self.tokens[at..], &mut self.head);
        finite(&self.head)?;
        self.head.iter_mut().for_each(|a| *a = a.tanh());
        self.state.last.copy_from_slice(&self.head);
        self.state.seen += 1;
        Ok(json!({"n": self.state.seen, "action": self.head}))
    }

    /// The state as a file.
    ///
    /// # Errors
    /// When the model is the twin, whose memory is not constant.
    pub fn save(&self) -> Result<Vec<u8>, FileError> {
        let mut parts = Vec::new();
        let f64s = |x: &[f64]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let f32s = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        for (l, layer) in self.state.layers.iter().enumerate() {
            let LayerState::Aaren(prefix) = layer else {
                return Err(FileError::Text {
                    key: "mixer",
                    got: "`attention`, whose state grows".into(),
                    want: "`aaren` to be saved".into(),
                });
            };
            let (heads, dim) = (prefix.heads(), prefix.dim());
            parts.push((
                format!("layers.{l}.lse"),
                Dtype::F64,
                vec![heads],
                f64s(prefix.lse()),
            ));
            parts.push((
                format!("layers.{l}.o"),
                Dtype::F32,
                vec![heads, dim],
                f32s(prefix.output()),
            ));
        }
        let State { time, sum, last, .. } = &self.state;
        parts.push(("time".into(), Dtype::F64, vec![1], f64s(&[*time])));
        parts.push(("sum".into(), Dtype::F64, vec![sum.len()], f64s(sum)));
        parts.push(("last".into(), Dtype::F32, vec![last.len()], f32s(last)));
        let texts = [
            ("format", FORMAT.to_owned()),
            ("model", format!("{:016x}", self.model.fingerprint())),
            ("seen", self.state.seen.to_string()),
        ];
        pack(&parts, &texts)
    }

    /// A saved state of this model.
    ///
    /// # Errors
    /// When the bytes are no state, or one of another model.
    pub fn load(model: &'m Model, bytes: &[u8]) -> Result<Self, FileError> {
        let raw = Raw::open(bytes)?;
        raw.is("format", FORMAT)?;
        raw.is("model", &format!("{:016x}", model.fingerprint()))?;
        let want = "a count of events";
        // Beyond 2^53 positions are no longer told apart.
        let seen = raw.text("seen", want)?.parse().ok().filter(|n| *n < 1 << 53);
        let seen = seen.ok_or_else(|| FileError::Text {
            key: "seen",
            got: "none".into(),
            want: want.into(),
        })?;
        let f64s = |name: &str, n: usize| -> Result<Vec<f64>, FileError> {
            let bytes = raw.bytes(name, (Dtype::F64, "F64"), &[n])?;
            Ok(bytes
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect())
        };
        let finite = |name: &str, x: Vec<f64>| match x.iter().all(|x| x.is_finite()) {
            true => Ok(x),
            false => Err(FileError::Number(name.into())),
        };
        let (heads, dim) = (model.config().heads, model.config().dim());
        let layers = (0..model.config().layers).map(|l| {
            let lse = f64s(&format!("layers.{l}.lse"), heads)?;
            let o = raw.floats(&format!("layers.{l}.o"), &[heads, dim])?;
            Prefix::from_parts(lse, o, dim)
                .map(LayerState::Aaren)
                .ok_or_else(|| FileError::Number(format!("layers.{l}.lse")))
        });
        let (sum, last) = sizes(model);
        let state = State {
            layers: layers.collect::<Result<_, _>>()?,
            seen,
            time: finite("time", f64s("time", 1)?)?[0],
            sum: finite("sum", f64s("sum", sum)?)?,
            last: raw.floats("last", &[last])?,
        };
        Ok(Self::resume(model, state))
    }
}

/// Lengths of [`State::sum`] and [`State::last`].
fn sizes(model: &Model) -> (usize, usize) {
    match &model.config().task {
        Task::Classify { .. } => (model.config().width, 0),
        Task::Forecast { .. } => (0, 0),
        Task::Events {
            marks, components, ..
        } => (0, 3 * components + marks),
        Task::Control { actions, .. } => (0, *actions),
    }
}

fn finite(x: &[f32]) -> Result<(), EventError> {
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(()),
        false => Err(EventError::Overflow),
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let m = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|x| (x - m).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}
