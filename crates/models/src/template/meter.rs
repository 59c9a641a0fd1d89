//! Rewrites a template so that it pays for every value that an operation may walk.
//!
//! A list that holds another one twice, sixty times over, is made in sixty steps, but has 2^60 leaves once it is printed, compared
//! or hashed, and the interpreter charges for most of that afterwards, if at all. So operands pass through [`PAID`], a filter that
//! charges for a walk over them before it happens. Lists and maps pay when they are made, which bounds their depth, too.

use std::cell::Cell;

use minijinja::Value;
use minijinja::machinery::ast::{
    AutoEscape, BinOp, BinOpKind, Call, CallArg, CallBlock, Compare, CompareOp, Const, Do, EmitExpr, EmitRaw,
    Expr, Filter, FilterBlock, ForLoop, GetAttr, GetItem, IfCond, IfExpr, List, Macro, Map, Set, SetBlock,
    Slice, Spanned, Stmt, Template, Test, Tuple, UnaryOp, UnaryOpKind, Var, WithBlock,
};

/// The name of the filter; no template can write it.
pub(super) const PAID: &str = "paid!";

/// Expressions in expressions: compiling takes time with the square of it. Real templates have up to a few dozen.
const MAX_DEPTH: usize = 500;

/// A template with its operands metered, or what is wrong with it.
pub(super) fn metered<'a>(template: &Stmt<'a>) -> Result<Stmt<'a>, &'static str> {
    let meter = Meter::default();
    let made = meter.stmt(template);
    if meter.too_deep.get() {
        return Err("expressions are nested deeper than 500");
    }
    made.ok_or("blocks, imports and includes need other templates, and there are none")
}

#[derive(Default)]
struct Meter {
    depth: Cell<usize>,
    too_deep: Cell<bool>,
}

/// Filters and tests that look at no more than the outside of a value.
fn is_cheap(name: &str) -> bool {
    matches!(
        name,
        "default"
            | "d"
            | "length"
            | "count"
            | "first"
            | "last"
            | "defined"
            | "undefined"
            | "none"
            | "string"
            | "mapping"
            | "sequence"
            | "iterable"
            | "number"
            | "integer"
            | "float"
            | "boolean"
            | "true"
            | "false"
            | "callable"
    )
}

fn through(from: Expr<'_>) -> Expr<'_> {
    let span = from.span();
    let filter = Filter {
        name: PAID,
        expr: Some(from),
        args: Vec::new(),
    };
    Expr::Filter(Spanned::new(filter, span))
}

fn args<'a>(from: &[CallArg<'a>], each: impl Fn(&Expr<'a>) -> Expr<'a>) -> Vec<CallArg<'a>> {
    let arg = |arg: &CallArg<'a>| match arg {
        CallArg::Pos(e) => CallArg::Pos(each(e)),
        CallArg::Kwarg(name, e) => CallArg::Kwarg(name, each(e)),
        CallArg::PosSplat(e) => CallArg::PosSplat(each(e)),
        CallArg::KwargSplat(e) => CallArg::KwargSplat(each(e)),
    };
    from.iter().map(arg).collect()
}

impl Meter {
    /// A statement with its operands metered; `None` for those that need other templates.
    fn stmt<'a>(&self, from: &Stmt<'a>) -> Option<Stmt<'a>> {
        Some(match from {
            Stmt::Template(s) => Stmt::Template(Spanned::new(
                Template {
                    children: self.stmts(&s.children)?,
                },
                s.span(),
            )),
            Stmt::EmitExpr(s) => {
                let emitted = match &s.expr {
                    // The interpreter knows this form.
                    Expr::Call(call) if matches!(&call.expr, Expr::Var(var) if var.id == "loop") => {
                        self.expr(&s.expr)
                    }
                    other => self.paid(other),
                };
                Stmt::EmitExpr(Spanned::new(EmitExpr { expr: emitted }, s.span()))
            }
            Stmt::EmitRaw(s) => Stmt::EmitRaw(Spanned::new(EmitRaw { raw: s.raw }, s.span())),
            Stmt::ForLoop(s) => Stmt::ForLoop(Spanned::new(
                ForLoop {
                    target: self.same(&s.target),
                    iter: self.expr(&s.iter),
                    filter_expr: s.filter_expr.as_ref().map(|e| self.expr(e)),
                    recursive: s.recursive,
                    body: self.stmts(&s.body)?,
                    else_body: self.stmts(&s.else_body)?,
                },
                s.span(),
            )),
            Stmt::IfCond(s) => Stmt::IfCond(Spanned::new(
                IfCond {
                    expr: self.expr(&s.expr),
                    true_body: self.stmts(&s.true_body)?,
                    false_body: self.stmts(&s.false_body)?,
                },
                s.span(),
            )),
            Stmt::WithBlock(s) => Stmt::WithBlock(Spanned::new(
                WithBlock {
                    assignments: s
                        .assignments
                        .iter()
                        .map(|(to, from)| (self.same(to), self.expr(from)))
                        .collect(),
                    body: self.stmts(&s.body)?,
                },
                s.span(),
            )),
            Stmt::Set(s) => Stmt::Set(Spanned::new(
                Set {
                    target: self.same(&s.target),
                    expr: self.expr(&s.expr),
                },
                s.span(),
            )),
            Stmt::SetBlock(s) => Stmt::SetBlock(Spanned::new(
                SetBlock {
                    target: self.same(&s.target),
                    filter: s.filter.as_ref().map(|e| self.expr(e)),
                    body: self.stmts(&s.body)?,
                },
                s.span(),
            )),
            Stmt::AutoEscape(s) => Stmt::AutoEscape(Spanned::new(
                AutoEscape {
                    enabled: self.expr(&s.enabled),
                    body: self.stmts(&s.body)?,
                },
                s.span(),
            )),
            Stmt::FilterBlock(s) => Stmt::FilterBlock(Spanned::new(
                FilterBlock {
                    filter: self.expr(&s.filter),
                    filter_span: s.filter_span,
                    body: self.stmts(&s.body)?,
                },
                s.span(),
            )),
            Stmt::Macro(s) => Stmt::Macro(Spanned::new(self.declaration(s)?, s.span())),
            Stmt::CallBlock(s) => Stmt::CallBlock(Spanned::new(
                CallBlock {
                    call: Spanned::new(self.call(&s.call), s.call.span()),
                    call_expr_span: s.call_expr_span,
                    macro_decl: Spanned::new(self.declaration(&s.macro_decl)?, s.macro_decl.span()),
                },
                s.span(),
            )),
            Stmt::Do(s) => Stmt::Do(Spanned::new(
                Do {
                    call: Spanned::new(self.call(&s.call), s.call.span()),
                },
                s.span(),
            )),
            Stmt::Block(_) | Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {
                return None;
            }
        })
    }

    fn stmts<'a>(&self, from: &[Stmt<'a>]) -> Option<Vec<Stmt<'a>>> {
        from.iter().map(|e| self.stmt(e)).collect()
    }

    fn declaration<'a>(&self, from: &Macro<'a>) -> Option<Macro<'a>> {
        Some(Macro {
            name: from.name,
            args: from.args.iter().map(|e| self.same(e)).collect(),
            defaults: from.defaults.iter().map(|e| self.expr(e)).collect(),
            body: self.stmts(&from.body)?,
        })
    }

    /// An expression through the filter that charges for it.
    fn paid<'a>(&self, from: &Expr<'a>) -> Expr<'a> {
        through(self.expr(from))
    }

    /// An operand: constants are as large as the source says.
    fn operand<'a>(&self, from: &Expr<'a>) -> Expr<'a> {
        match from {
            Expr::Const(_) => self.expr(from),
            _ => self.paid(from),
        }
    }

    fn call<'a>(&self, from: &Call<'a>) -> Call<'a> {
        Call {
            expr: self.expr(&from.expr),
            args: args(&from.args, |e| self.operand(e)),
        }
    }

    /// Targets of assignments are copied, not metered.
    fn same<'a>(&self, from: &Expr<'a>) -> Expr<'a> {
        let span = from.span();
        match from {
            Expr::List(e) => {
                let items = e.items.iter().map(|e| self.same(e)).collect();
                Expr::List(Spanned::new(List { items }, span))
            }
            Expr::Tuple(e) => {
                let items = e.items.iter().map(|e| self.same(e)).collect();
                Expr::Tuple(Spanned::new(Tuple { items }, span))
            }
            _ => self.expr(from),
        }
    }

    /// An expression that is looked at from outside, or an operand.
    fn part<'a>(&self, from: &Expr<'a>, outside: bool) -> Expr<'a> {
        if outside {
            self.expr(from)
        } else {
            self.operand(from)
        }
    }

    fn expr<'a>(&self, from: &Expr<'a>) -> Expr<'a> {
        let span = from.span();
        let depth = self.depth.get();
        if depth == MAX_DEPTH {
            self.too_deep.set(true);
            let value = Value::UNDEFINED;
            return Expr::Const(Spanned::new(Const { value }, span));
        }
        self.depth.set(depth + 1);
        let made = self.deeper(from);
        self.depth.set(depth);
        made
    }

    fn deeper<'a>(&self, from: &Expr<'a>) -> Expr<'a> {
        let span = from.span();
        match from {
            Expr::Var(e) => Expr::Var(Spanned::new(Var { id: e.id }, span)),
            Expr::Const(e) => {
                let value = e.value.clone();
                Expr::Const(Spanned::new(Const { value }, span))
            }
            Expr::Slice(e) => Expr::Slice(Spanned::new(
                Slice {
                    expr: self.expr(&e.expr),
                    start: e.start.as_ref().map(|e| self.expr(e)),
                    stop: e.stop.as_ref().map(|e| self.expr(e)),
                    step: e.step.as_ref().map(|e| self.expr(e)),
                },
                span,
            )),
            Expr::UnaryOp(e) => {
                #[expect(clippy::needless_match, reason = "the type cannot be copied")]
                let op = match e.op {
                    UnaryOpKind::Not => UnaryOpKind::Not,
                    UnaryOpKind::Neg => UnaryOpKind::Neg,
                };
                let expr = self.expr(&e.expr);
                Expr::UnaryOp(Spanned::new(UnaryOp { op, expr }, span))
            }
            Expr::BinOp(e) => {
                let whole = matches!(e.op, BinOpKind::ScAnd | BinOpKind::ScOr);
                let side = |from: &Expr<'a>| self.part(from, whole);
                let op = BinOp {
                    op: e.op,
                    left: side(&e.left),
                    right: side(&e.right),
                };
                let made = Expr::BinOp(Spanned::new(op, span));
                match e.op {
                    BinOpKind::Mul => through(made),
                    _ => made,
                }
            }
            Expr::Compare(e) => {
                let op = |op: &CompareOp<'a>| CompareOp {
                    op: op.op,
                    expr: self.operand(&op.expr),
                };
                let ops = e.ops.iter().map(op).collect();
                let expr = self.operand(&e.expr);
                Expr::Compare(Spanned::new(Compare { expr, ops }, span))
            }
            Expr::IfExpr(e) => Expr::IfExpr(Spanned::new(
                IfExpr {
                    test_expr: self.expr(&e.test_expr),
                    true_expr: self.expr(&e.true_expr),
                    false_expr: e.false_expr.as_ref().map(|e| self.expr(e)),
                },
                span,
            )),
            Expr::Filter(e) => {
                // The test of this name is cheap, the filter is not.
                let cheap = is_cheap(e.name) && e.name != "string";
                let each = |from: &Expr<'a>| self.part(from, cheap);
                let filter = Filter {
                    name: e.name,
                    expr: e.expr.as_ref().map(&each),
                    args: args(&e.args, each),
                };
                through(Expr::Filter(Spanned::new(filter, span)))
            }
            Expr::Test(e) => {
                let each = |from: &Expr<'a>| self.part(from, is_cheap(e.name));
                let test = Test {
                    name: e.name,
                    expr: each(&e.expr),
                    args: args(&e.args, each),
                };
                Expr::Test(Spanned::new(test, span))
            }
            Expr::GetAttr(e) => {
                let expr = self.expr(&e.expr);
                Expr::GetAttr(Spanned::new(GetAttr { expr, name: e.name }, span))
            }
            Expr::GetItem(e) => Expr::GetItem(Spanned::new(
                GetItem {
                    expr: self.expr(&e.expr),
                    subscript_expr: self.operand(&e.subscript_expr),
                },
                span,
            )),
            Expr::Call(e) => through(Expr::Call(Spanned::new(self.call(e), span))),
            Expr::List(e) => {
                let items = e.items.iter().map(|e| self.expr(e)).collect();
                through(Expr::List(Spanned::new(List { items }, span)))
            }
            Expr::Tuple(e) => {
                let items = e.items.iter().map(|e| self.expr(e)).collect();
                through(Expr::Tuple(Spanned::new(Tuple { items }, span)))
            }
            Expr::Map(e) => {
                let map = Map {
                    keys: e.keys.iter().map(|e| self.operand(e)).collect(),
                    values: e.values.iter().map(|e| self.expr(e)).collect(),
                };
                through(Expr::Map(Spanned::new(map, span)))
            }
        }
    }
}
