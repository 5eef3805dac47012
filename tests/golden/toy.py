import torch
from torch import nn

from lilliput import Task


def make():
    torch.manual_seed(0)
    x = torch.randn(160, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        y = (model(x) + 0.1 * torch.randn(160, 3)).argmax(1)
    return model, Task("toy", (x[:96], y[:96]), (x[96:128], y[96:128]), (x[128:], y[128:]))
